"""Modes and flags during a block, and their restoration."""

import pytest
import torch
from support.tiny import tiny

from siftune.models.modules import evaluating, flags_restored, trainable_only

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def model():
    """A llama with every second parameter frozen, one layer in eval mode, and gradients from a pass before."""
    model = tiny("llama")
    for place, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(place % 2 == 0)
    model(IDS, labels=IDS).loss.backward()
    model.train()
    model.model.layers[1].eval()
    return model


def state(model):
    """Modes, flags and gradients, these by identity and by value."""
    parameters = list(model.parameters())
    return (
        [module.training for module in model.modules()],
        [p.requires_grad for p in parameters],
        [(id(p.grad), None if p.grad is None else p.grad.tolist()) for p in parameters],
    )


@pytest.mark.parametrize("fails", [False, True])
def test_all_comes_back_after_training(model, fails):
    before = state(model)
    try:
        with flags_restored(model):
            model.requires_grad_(True)
            model.zero_grad()
            model.eval()
            model(IDS, labels=IDS).loss.backward()
            assert all(p.grad is not None for p in model.parameters())
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert state(model) == before


def test_gradients_flow_to_some_only(model):
    before = state(model)
    chosen = [*model.model.layers[0].parameters()][:2]
    with trainable_only(model, iter(chosen)):
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in chosen}
    assert state(model) == before


def test_nothing_is_trainable_by_default(model):
    before = state(model)
    with trainable_only(model):
        assert not any(p.requires_grad for p in model.parameters())
        with pytest.raises(RuntimeError, match="does not require grad"):
            model(IDS, labels=IDS).loss.backward()
    assert state(model) == before


def test_evaluation_mode_is_for_the_block(model):
    before = state(model)
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert state(model) == before
