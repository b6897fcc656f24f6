"""The reference ways to run GAST choose what siftune's engine chooses, number for number."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapted import shake
from support.oracles import summed_loss
from support.tiny import batch, tiny

from lab.baselines import StoreAll, TwoPass
from siftune import GAST
from siftune.base.errors import UnsupportedError
from siftune.methods.drivers.batches import UserBatches
from siftune.methods.options import GASTSettings

PASSES = {TwoPass: [6, 6], StoreAll: [6]}  # rows of every pass over the model, for 3 of 6 rows


def lora(**settings):
    """Matrices of different sizes, and a layer with fewer of them."""
    targets = ["q_proj", "v_proj", "layers.1.mlp.up_proj"]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, rank_pattern={"v_proj": 2}, **settings)
    return shake(get_peft_model(tiny("llama"), config)).eval().double()


def taken(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize(
    "settings", [{"support": "rest"}, {"support": "sample", "choice": "topk"}], ids=["rest", "sample"]
)
def test_choices_and_gradients_are_those_of_the_engine(kind, settings):
    model, seen = lora(), []
    batches = [batch(model, 6, seed=1), batch(model, 5, seed=2)]
    support = [batch(model, 4, seed=3), batch(model, 2, seed=4)] if settings["support"] == "sample" else None
    settings = {**settings, "select": 3}
    wanted = []
    with GAST(**settings, seed=5).attach(model, batches=support, loss=summed_loss) as sift:
        for inputs in batches:
            summed_loss(model, inputs).backward()
            wanted.append((sift.last, taken(model)))
            sift.step()

    def run(part):
        seen.append(len(part["input_ids"]))
        loss = summed_loss(model, part)
        loss.backward()
        return loss.detach()

    draws = UserBatches(support) if support else None
    baseline = kind(model, GASTSettings(**settings), draws, loss=summed_loss, seed=5)
    for inputs, (choice, grads) in zip(batches, wanted, strict=True):
        baseline.begin()
        baseline.step(inputs, run)
        torch.testing.assert_close(baseline.last.scores, choice.scores, rtol=1e-10, atol=1e-10)
        assert torch.equal(baseline.last.selected, choice.selected)
        torch.testing.assert_close(taken(model), grads, rtol=1e-10, atol=1e-10)
    assert seen[: len(PASSES[kind])] == PASSES[kind]


def test_other_adapters_are_refused():
    with pytest.raises(UnsupportedError, match="trains"):
        TwoPass(lora(use_dora=True), GASTSettings(support="rest"))
