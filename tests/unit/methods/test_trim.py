"""Trim against a loop over rows, each with a pass of its own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import batch
from support.trainers import adapted, rows, train
from torch import nn

from siftune import Trim
from siftune.base.errors import RecipeError, UnsupportedError
from siftune.data.batches import Collator
from siftune.methods.trim import factor, smallest
from siftune.train.trainer import SiftTrainer


def mean_loss(model, inputs, row):
    """The mean token loss of one row, by a pass of its own and a sum over its tokens."""
    ids, labels = inputs["input_ids"][row], inputs["labels"][row]
    with torch.no_grad():
        logits = model(input_ids=ids[None], attention_mask=inputs["attention_mask"][row][None]).logits[0].double()
    tokens = [t for t in range(1, len(labels)) if labels[t] != -100]
    losses = [-(logits[t - 1] - logits[t - 1].logsumexp(0))[labels[t]].item() for t in tokens]
    return sum(losses) / len(losses)


@given(st.lists(st.one_of(st.just(math.nan), st.integers(0, 9).map(float)), min_size=1, max_size=9), st.data())
def test_the_choice_is_the_head_of_the_sorted_rows(losses, data):
    count = data.draw(st.integers(1, len(losses)))
    order = sorted(range(len(losses)), key=lambda row: (math.isnan(losses[row]), losses[row], row))
    valid = [row for row in range(len(losses)) if not math.isnan(losses[row])]
    if len(valid) < len(losses):  # NaN has no order
        order = sorted(valid, key=lambda row: (losses[row], row)) + [r for r in range(len(losses)) if r not in valid]
    losses_B = torch.tensor(losses, dtype=torch.float64)
    chosen = smallest(losses_B, count)
    assert chosen.tolist() == sorted(order[:count])
    followed = [row for row in valid if row in order[:count]]
    assert factor(losses_B, chosen) == pytest.approx(len(valid) / max(1, len(followed)))


def test_a_custom_loop_follows_the_rows_of_smallest_loss():
    model = adapted().double()
    inputs = batch(model, 5)
    losses = [mean_loss(model, inputs, row) for row in range(5)]
    model.train()
    with Trim(select=2).attach(model) as sift:
        model(**inputs).loss.backward()
    assert sift.last.selected.tolist() == [sorted(sorted(range(5), key=lambda row: losses[row])[:2])]
    torch.testing.assert_close(
        sift.last.scores[0].double(), torch.tensor(losses, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_siftunes_own_trainer_calls_the_model_without_labels_and_supplies_them(tmp_path):
    trim, model = Trim(select=2, keep=True), adapted()
    calls = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(kwargs) if model.training else None, with_kwargs=True
    )
    data = rows(12).add_column("row", list(range(12)))
    settings = {"trainer": SiftTrainer, "collator": Collator(0), "max_steps": 3, "remove_unused_columns": False}
    train(tmp_path, trim, model=model, dataset=data, **settings)
    assert all("labels" not in kwargs for kwargs in calls)
    assert len(trim.history) == 3
    fresh, first = adapted(), trim.history[0]
    taken = data.select(first.rows.tolist())
    inputs = {name: torch.tensor(taken[name]) for name in ("input_ids", "attention_mask", "labels")}
    losses = torch.tensor([mean_loss(fresh, inputs, row) for row in range(4)])
    torch.testing.assert_close(first.scores[0], losses, rtol=1e-4, atol=0)
    assert first.selected[0].tolist() == losses.argsort()[:2].sort().values.tolist()


def test_batches_without_losses_of_rows_are_refused():
    model = adapted().train()
    inputs = batch(model, 4)
    labels = inputs.pop("labels")
    with Trim(select=1).attach(model), pytest.raises(UnsupportedError, match="labels"):
        nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten()).backward()
    with Trim(select=1, pairs=True).attach(model), pytest.raises(UnsupportedError, match="pairs"):
        model(**inputs, labels=labels).loss.backward()
    with pytest.raises(RecipeError, match="support_set"):
        Trim(support_set=[inputs])
