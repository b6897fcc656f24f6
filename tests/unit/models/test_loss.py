"""The loss over label positions is the model's own, for every family of models."""

import pytest
import torch
from support.tiny import FAMILIES, batch, tiny

from siftune.models.loss import (
    IGNORED,
    difference_from_model,
    label_positions,
    logits_at,
    next_labels,
    token_loss,
)


def label_loss(model, inputs, items=None):
    with logits_at(model, label_positions(inputs["labels"])):
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return token_loss(logits, inputs["labels"], items)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, **tolerance):
    assert set(ours) == set(theirs)
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_model(family):
    model = tiny(family, layers=2)
    if family in ("mixtral", "qwen3_moe"):
        model.set_experts_implementation("eager")  # the others have no float64
    model.double()
    inputs = batch(model)
    ours, theirs = label_loss(model, inputs), model(**inputs).loss
    torch.testing.assert_close(ours, theirs.float(), rtol=1e-6, atol=1e-6)
    assert_same(gradients(model, ours), gradients(model, theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_given_number_of_items_is_the_divisor(family):
    model = tiny(family, layers=2)
    inputs = batch(model)
    theirs = model(**inputs, num_items_in_batch=50)
    for items in (50, torch.tensor(50)):
        torch.testing.assert_close(label_loss(model, inputs, items), theirs.loss)
    assert not torch.isclose(theirs.loss, label_loss(model, inputs), rtol=0.1)


@pytest.mark.parametrize("items", [None, 0, 3, torch.tensor(0), torch.tensor(3)])
def test_without_any_label_the_loss_is_zero(items):
    model = tiny("llama", layers=2)
    inputs = batch(model)
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    loss = label_loss(model, inputs, items)
    assert loss.item() == 0.0
    assert all(not grad.any() for grad in gradients(model, loss).values())


def test_the_first_token_is_never_predicted():
    labels = torch.tensor([[5, IGNORED, 6, 7], [8, IGNORED, IGNORED, 9], [4, IGNORED, IGNORED, IGNORED]])
    assert label_positions(labels).nonzero().tolist() == [[0, 1], [0, 2], [1, 2]]
    assert next_labels(labels).tolist() == [6, 7, 9]


def test_the_comparison_takes_the_row_with_most_labels():
    model = tiny("llama", layers=2)
    inputs = batch(model, rows=4)
    row = int((inputs["labels"] != IGNORED).sum(1).argmax())
    with torch.no_grad():
        ours, theirs = difference_from_model(model, inputs)
        alone = float(model(**{name: value[row : row + 1] for name, value in inputs.items()}).loss)
    assert ours == pytest.approx(alone, rel=1e-5)
    assert theirs == pytest.approx(alone, rel=1e-5)
