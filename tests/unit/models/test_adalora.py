"""AdaLoRA: the ranks that are left are those of PEFT's own loop, with the schedule of the run's steps."""

import pytest
import torch
from support.seen import Seen
from support.tiny import tiny
from support.trainers import train, weights

from siftune import GAST, RST
from siftune.errors import UnsupportedError
from siftune.models.adapters import attach_adapter
from siftune.models.carriers.adalora import Allocator

STEPS = 10


def adalora():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return attach_adapter(tiny("llama"), "adalora", rank=2).train()


def test_ranks_and_weights_are_those_of_pefts_loop(tmp_path):
    model, loop = adalora(), adalora()
    seen = Seen(model)
    train(tmp_path, Allocator(), model=model, max_steps=STEPS, lr_scheduler_type="constant", learning_rate=0.05)
    config = loop.peft_config["default"]
    config.total_step, config.tinit, config.tfinal, config.deltaT = STEPS, 1, 2, 1
    optimizer = torch.optim.AdamW([p for p in loop.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    for number, inputs in enumerate(seen.all, 1):
        loop(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(loop.parameters(), 1.0)
        optimizer.step()
        loop.base_model.update_and_allocate(number)
        optimizer.zero_grad()
    ours, theirs = (each.peft_config["default"].rank_pattern for each in (model, loop))
    assert ours == theirs
    left = [sum(ranks) for ranks in ours.values()]
    assert sum(left) == 2 * len(left)  # the budget, however it is shared out
    assert len(set(left)) > 1
    for name, value in weights(model).items():
        torch.testing.assert_close(value, weights(loop)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [RST(active=0.5), GAST(select=2, support="rest")])
def test_nothing_may_be_left_out(method):
    with pytest.raises(UnsupportedError, match="allots its ranks by the gradients of all layers and rows"):
        method.attach(adalora())
