"""AdaLoRA: the ranks that are left are those of PEFT's own loop, with the schedule of the run's steps."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.seen import Seen
from support.tiny import batch, tiny
from support.trainers import train, weights

from siftune import GAST, RST
from siftune.base.errors import RecipeError, UnsupportedError
from siftune.methods.allocator import FILE, Allocator
from siftune.models.adapters.attach import attach_adapter

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


SAVED = {"max_steps": STEPS, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 3, "save_total_limit": None}


def test_a_run_goes_on_bit_for_bit_and_is_saved_with_the_ranks_that_are_left(tmp_path):
    whole, _ = train(tmp_path / "whole", Allocator(), model=adalora(), **SAVED)
    for step in (3, 9):  # while ranks go and come back, and after the last has gone
        place = tmp_path / "whole" / f"checkpoint-{step}"
        again, _ = train(tmp_path / "again", Allocator(), model=adalora(), resume=str(place), **SAVED)
        assert again.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern
        ours, theirs = weights(again), weights(whole)
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        held = load_file(place / FILE)
        assert any(name.startswith("left/") for name in held)
        assert any("exp_avg" in name for name in held) == (step == 3)
        assert set(ranks(place)) == {3}
    whole.save_pretrained(tmp_path / "end")
    assert sum(ranks(tmp_path / "end")) == 2 * len(ranks(tmp_path / "end"))
    inputs = {"input_ids": batch(whole)["input_ids"]}
    saved = PeftModel.from_pretrained(tiny("llama"), tmp_path / "end")
    torch.testing.assert_close(saved(**inputs).logits, whole.eval()(**inputs).logits, rtol=1e-5, atol=1e-6)
    (place / FILE).unlink()
    with pytest.raises(RecipeError, match=f"checkpoint-9 has no {FILE}"):
        train(tmp_path / "again", Allocator(), model=adalora(), resume=str(place), **SAVED)


def ranks(folder):
    """Of every matrix in a folder."""
    return [v.shape[0] for n, v in load_file(folder / "adapter_model.safetensors").items() if n.endswith("lora_E")]


@pytest.mark.parametrize("method", [RST(active=0.5), GAST(select=2, support="rest")])
def test_nothing_may_be_left_out(method):
    with pytest.raises(UnsupportedError, match="allots its ranks by the gradients of all layers and rows"):
        method.attach(adalora())
