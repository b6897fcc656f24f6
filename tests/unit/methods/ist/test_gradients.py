"""IST's importance from gradients: a loop over the norms that a step has, no passes, and resuming."""

import math

import pytest
import torch
from support.seen import assert_same
from support.tiny import batch
from support.trainers import adapted, train, weights
from transformers import TrainerCallback

from siftune import IST
from siftune.base.errors import RecipeError
from siftune.engine.groups import group_by_layer

FREE = {"importance_from": "gradients"}


def recorded(**settings):
    method, chosen = IST(**FREE, **settings), []
    method.on_select = chosen.append
    return method, chosen


class Norms(TrainerCallback):
    """The norm of each layer's gradient just before the optimizer's step, by plain sums in float64."""

    def __init__(self, model):
        self.model, self.all = model, []

    def on_pre_optimizer_step(self, *_, **__):
        squares = {}
        for group in group_by_layer(self.model):
            grads = [p.grad.double() for p in group.parameters.values() if p.grad is not None]
            if grads:
                squares[group.index] = sum(float((grad * grad).sum()) for grad in grads)
        self.all.append({layer: math.sqrt(square) for layer, square in squares.items()})


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_importance_is_a_loop_over_the_norms_of_the_layers_that_trained(tmp_path, clip):
    method, chosen = recorded(active=0.5)
    model = adapted()
    norms = Norms(model)
    train(tmp_path, norms, method, model=model, gradient_accumulation_steps=2, max_steps=12, max_grad_norm=clip)
    importance = [0.0] * 4
    for choice, found in zip(chosen, norms.all, strict=True):
        assert choice.importance.tolist() == pytest.approx(importance, abs=1e-6)
        assert tuple(found) == choice.layers
        level = sum(math.log(norm) - importance[layer] for layer, norm in found.items()) / len(found)
        for layer, norm in found.items():
            importance[layer] = 0.9 * importance[layer] + 0.1 * (math.log(norm) - level)
    assert method.importance.tolist() == pytest.approx(importance, abs=1e-6)
    assert max(map(abs, importance)) > 0.05
    assert method.importance.dtype == torch.float64


def test_it_makes_no_pass_of_its_own_and_needs_no_rows(tmp_path):
    method, _ = recorded()
    model, passes = adapted(), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    train(tmp_path, method, model=model, max_steps=12)
    assert len(passes) == 12


def test_all_layers_active_is_plain_training_bit_for_bit(tmp_path):
    (plain, _), (model, _) = train(tmp_path, max_steps=12), train(tmp_path, recorded(active=1.0)[0], max_steps=12)
    assert_same(weights(plain), weights(model))


@pytest.mark.parametrize("stop", [3, 4])
def test_resume_is_bitwise_the_unbroken_run(tmp_path, stop):
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": stop, "gradient_accumulation_steps": 2}
    (whole, wanted), (again, chosen) = recorded(active=0.5), recorded(active=0.5)
    unbroken, _ = train(tmp_path, whole, **settings)
    resumed, _ = train(tmp_path, again, resume=str(tmp_path / f"checkpoint-{stop}"), **settings)
    assert [(c.step, c.layers, c.losses, c.moved) for c in chosen] == [
        (c.step, c.layers, c.losses, c.moved) for c in wanted[stop:]
    ]
    assert torch.equal(whole.importance, again.importance)
    assert_same(weights(unbroken), weights(resumed))


def test_the_importance_moves_at_every_step_but_the_first(tmp_path):
    method, chosen = recorded(active=0.5)
    train(tmp_path, method, max_steps=4)
    assert [c.moved for c in chosen] == [False, True, True, True]


def test_a_plain_loop_gives_its_optimizer_and_no_batches():
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.raises(RecipeError, match=r"settings of IST act around optimizer steps: give attach\("):
        IST(**FREE).attach(model)
    with IST(**FREE, active=0.5).attach(model, optimizer=optimizer) as sift:
        for step in range(4):
            model(**batch(model, seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state = sift.state_dict()
        assert sift.importance.abs().max() > 0
    with IST(**FREE, active=0.5).attach(model, optimizer=optimizer) as again:
        again.load_state_dict(state)
        assert torch.equal(again.importance, sift.importance)
        assert again.last.layers == sift.last.layers


@pytest.mark.parametrize(
    ("name", "value"),
    [("interval", 5), ("interval", None), ("score_batch_size", 4), ("candidates", 2), ("suppressed", 0.3),
     ("factor", 0.5), ("score_lr", 1.0)],
)  # fmt: skip
def test_settings_of_the_scoring_are_refused(name, value):
    with pytest.raises(RecipeError, match=rf"^ist\.{name} is {value}, which has no effect with ist\.importance_from "):
        IST(**FREE, **{name: value})
    IST(**{name: value})


def test_another_source_is_refused():
    with pytest.raises(RecipeError, match=r"importance_from is 'loss', but must be one of response, gradients"):
        IST(importance_from="loss")
