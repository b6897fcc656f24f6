"""Log-likelihood of rows and of choices against loops over tokens."""

import math

import numpy as np
import pytest
import torch
from support.tiny import FAMILIES, tiny

from siftune.base.errors import DataError
from siftune.evaluate.likelihood import ChoiceItem, ChoiceResult, perplexity, row_nll, score_choices, shared_nll
from siftune.models import loss

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
    monkeypatch.setattr(loss, "_AT_A_TIME", {"cpu": 3 * model.config.vocab_size})
    np.testing.assert_allclose(row_nll(model, ROWS).nll, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma3n", "lfm2", "mamba", "rwkv"])
def test_prompts_that_are_read_once_change_nothing(family, batch_size):
    """Prompts of different lengths have several answers each; one of more rows than a batch, one has a single row."""
    model = tiny(family)
    prompts, answers = (
        [[7, 8], [3, 4, 5, 6, 9], [2], [11, 12, 13]],
        [[20], [21, 22, 23], [24, 25], [26, 27], [28, 29]],
    )
    rows = [(prompt + answer, [-100] * len(prompt) + answer) for prompt in prompts[:3] for answer in answers]
    rows += [([*prompts[3], 30, 31, 32], [-100, -100, -100, 30, -100, 32]), *ROWS]
    result, wanted = shared_nll(model, rows, batch_size), row_nll(model, rows)
    np.testing.assert_allclose(result.nll, wanted.nll, rtol=0, atol=1e-5)
    assert result.tokens.tolist() == wanted.tokens.tolist()
    assert np.unique(np.round(wanted.nll, 4)).size > 15  # the rows differ


@pytest.mark.parametrize("family", ["llama", "gemma3n"])  # the last layers of gemma3n use the keys of others
def test_a_prompt_is_read_once_in_a_batch(family, monkeypatch):
    model = tiny(family)
    seen, forward = [], type(model).forward

    def counted(self, input_ids=None, **more):
        seen.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(type(model), "forward", counted)
    shared_nll(model, [([1, 2, 3, answer, 9], [-100, -100, -100, answer, 9]) for answer in range(10, 14)])
    assert seen == [(1, 3), (4, 1)]


def test_lists_of_unequal_length(model):
    with pytest.raises(DataError, match="row 1: 2 input ids but 1 labels"):
        perplexity(model, [([1, 2], [1, 2]), ([1, 2], [1])])


@pytest.mark.parametrize("rows", [[], [([1, 2], [-100, -100])], [([1], [1])]])
def test_nothing_to_measure(model, rows):
    with pytest.raises(DataError, match=f"none of the {len(rows)} rows"):
        perplexity(model, rows)


ITEMS = [
    ChoiceItem([5, 6, 7], [[8], [9, 10], [11, 12, 13]], 1),
    ChoiceItem([20], [[21, 22], [23]], 0),
    ChoiceItem([30, 31, 32, 33, 34, 35, 36], [[37], [38], [39], [40]], 3),
]


def loop(model, item):
    """Feed one token more at a time and read off its probability."""
    sums = []
    for choice in item.choices_ids:
        total = 0.0
        for t, token in enumerate(choice):
            ids = torch.tensor([[*item.prompt_ids, *choice[:t]]])
            with torch.no_grad():
                total += torch.log_softmax(model.eval()(input_ids=ids).logits[0, -1], 0)[token].item()
        sums.append(total)
    return np.array(sums)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_equals_a_loop_over_tokens_at_any_batch_size(model, batch_size):
    result = score_choices(model, ITEMS, batch_size)
    for found, item in zip(result.loglik, ITEMS, strict=True):
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, loop(model, item), rtol=0, atol=1e-10)
    assert [lengths.tolist() for lengths in result.lengths] == [[1, 2, 3], [2, 1], [1, 1, 1, 1]]
    assert result.answers.tolist() == [1, 0, 3]


def test_predictions_by_sum_and_by_mean():
    result = ChoiceResult(
        loglik=[np.array([-3.0, -4.0]), np.array([-1.0, -1.0, -5.0])],
        lengths=[np.array([1, 2]), np.array([1, 1, 10])],
        answers=np.array([1, 0]),
    )
    assert result.by_sum.tolist() == [0, 0]  # the first of equals
    assert result.by_mean.tolist() == [1, 2]
    assert result.correct().tolist() == [False, True]
    assert result.correct(normalised=True).tolist() == [True, False]
