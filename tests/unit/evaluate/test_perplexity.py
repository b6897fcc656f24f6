import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftune.base.errors import DataError
from siftune.data.batches import by_length
from siftune.evaluate.likelihood import perplexity, row_nll
from siftune.models import loss as cross_entropy

# lengths 1 to 9; labels at the end, in the middle, at position 0 (not predictable), everywhere, nowhere
ROWS = [
    ([5, 6, 7, 8], [-100, -100, 7, 8]),
    ([9], [9]),
    ([1, 2, 3, 4, 5, 6, 7, 8, 9], [-100, 2, -100, -100, 5, 6, -100, -100, -100]),
    ([10, 20], [10, 20]),
    ([30, 31, 32, 33, 34], [-100] * 5),
    ([40, 41, 42, 43, 44, 45], [40, 41, 42, 43, 44, 45]),
]
TOKENS = [2, 0, 3, 1, 0, 5]


def one_by_one(model, ids, labels):
    """The slow obvious way: no padding, one softmax per position, the model's full logits."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    total = 0.0
    for t in range(1, len(ids)):
        if labels[t] != -100:
            total -= math.log(torch.softmax(logits[t - 1], 0)[labels[t]].item())
    return total


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
def test_equals_a_loop_over_rows_at_any_batch_size(model, batch_size):
    result = perplexity(model, ROWS, batch_size)
    wanted = np.array([one_by_one(model, *row) for row in ROWS])
    np.testing.assert_allclose(result.nll, wanted, rtol=0, atol=1e-10)
    assert result.tokens.tolist() == TOKENS


def test_long_rows_are_widened_in_parts(model, monkeypatch):
    whole = row_nll(model, ROWS).nll
    monkeypatch.setattr(cross_entropy, "_AT_A_TIME", {"cpu": 3 * model.config.vocab_size})
    np.testing.assert_allclose(row_nll(model, ROWS).nll, whole, rtol=0, atol=1e-12)


def test_lists_of_unequal_length(model):
    with pytest.raises(DataError, match="row 1: 2 input ids but 1 labels"):
        perplexity(model, [([1, 2], [1, 2]), ([1, 2], [1])])


@pytest.mark.parametrize("rows", [[], [([1, 2], [-100, -100])], [([1], [1])]])
def test_nothing_to_measure(model, rows):
    with pytest.raises(DataError, match=f"none of the {len(rows)} rows"):
        perplexity(model, rows)


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 9))
def test_batches_hold_every_row_once_the_longest_first(lengths, batch_size):
    batches = list(by_length(lengths, batch_size))
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert all(len(batch) <= batch_size for batch in batches)
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
