"""Trim against a loop over rows: which rows it keeps, by losses that single passes give."""

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
from siftune.data.tokenize import Collator
from siftune.methods.trim import maths
from siftune.train.trainer import SiftTrainer


def mean_loss(model, inputs, row):
    """The mean token loss of one row, by a pass of its own and a sum over its tokens."""
    ids, labels = inputs["input_ids"][row], inputs["labels"][row]
    with torch.no_grad():
        logits = model(input_ids=ids[None], attention_mask=inputs["attention_mask"][row][None]).logits[0].double()
    tokens = [t for t in range(1, len(labels)) if labels[t] != -100]
    losses = [-(logits[t - 1] - logits[t - 1].logsumexp(0))[labels[t]].item() for t in tokens]
    return sum(losses) / len(losses)


@given(
    st.lists(st.one_of(st.just(math.nan), st.integers(0, 9).map(float)), min_size=1, max_size=9),
    st.data(),
    st.sampled_from(["small", "large", "random"]),
)
def test_the_choice_is_that_of_sorting_by_hand(losses, data, which):
    count = data.draw(st.integers(1, len(losses)))
    uniform = data.draw(st.lists(st.floats(0, 0.99), min_size=len(losses), max_size=len(losses)))
    keys = {"small": losses, "large": [-loss for loss in losses], "random": uniform}[which]
    order = sorted(
        range(len(losses)),
        key=lambda row: (math.isnan(losses[row]), keys[row] if losses[row] == losses[row] else 0, row),
    )
    wide = torch.tensor(losses, dtype=torch.float64)
    chosen = maths.choose(wide, torch.tensor(uniform, dtype=torch.float64), count, which)
    assert chosen.tolist() == sorted(order[:count])
    live = [row for row in range(len(losses)) if losses[row] == losses[row]]
    followed = [row for row in live if row in order[:count]]
    assert maths.factor(wide, chosen) == pytest.approx(len(live) / max(1, len(followed)))


@pytest.mark.parametrize(("which", "sign"), [("small", 1), ("large", -1)])
def test_a_plain_loop_follows_the_rows_of_smallest_or_largest_loss(which, sign):
    model = adapted().double()
    inputs = batch(model, 5)
    losses = [mean_loss(model, inputs, row) for row in range(5)]
    model.train()
    with Trim(select=2, which=which).attach(model) as sift:
        model(**inputs).loss.backward()
    assert sift.last.selected.tolist() == [sorted(sorted(range(5), key=lambda row: sign * losses[row])[:2])]
    torch.testing.assert_close(
        sift.last.scores[0].double(), torch.tensor(losses, dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert not model._forward_hooks


def test_siftunes_own_trainer_whose_model_is_called_without_labels_gives_them_too(tmp_path):
    trim, model = Trim(select=2, keep=True), adapted()
    seen = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs) if model.training else None, with_kwargs=True
    )
    data = rows(12).add_column("row", list(range(12)))
    train(
        tmp_path,
        trim,
        model=model,
        dataset=data,
        trainer=SiftTrainer,
        collator=Collator(0),
        max_steps=3,
        remove_unused_columns=False,
    )
    assert all("labels" not in kwargs for kwargs in seen)
    assert len(trim.history) == 3
    fresh, first = adapted(), trim.history[0]
    taken = data.select(first.rows.tolist())
    inputs = {name: torch.tensor(taken[name]) for name in ("input_ids", "attention_mask", "labels")}
    losses = torch.tensor([mean_loss(fresh, inputs, row) for row in range(4)])
    torch.testing.assert_close(first.scores[0], losses, rtol=1e-4, atol=0)
    assert first.selected[0].tolist() == losses.argsort()[:2].sort().values.tolist()


def test_at_random_no_loss_decides_and_none_is_recorded():
    model = adapted().train()
    inputs, seen = batch(model, 6), set()
    with Trim(select=2, which="random").attach(model) as sift:
        for _ in range(20):
            model(**inputs).loss.backward()
            assert sift.last.scores.isnan().all()
            seen |= set(sift.last.selected[0].tolist())
    assert seen == set(range(6))


def test_what_has_no_losses_of_rows_is_refused():
    model = adapted().train()
    inputs = batch(model, 4)
    labels = inputs.pop("labels")
    with Trim(select=1).attach(model), pytest.raises(UnsupportedError, match="must be called with labels"):
        nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten()).backward()
    with Trim(select=1, pairs=True).attach(model), pytest.raises(UnsupportedError, match="2 samples has 4 rows: pairs"):
        model(**inputs, labels=labels).loss.backward()
    with pytest.raises(RecipeError, match="leave support_set out"):
        Trim(support_set=[inputs])
    with pytest.raises(RecipeError, match=r"trim\.which is 'best'"):
        Trim(which="best")
