"""Margins against sums by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftune.suspects.margins import margins


@st.composite
def compared(draw):
    """Answers, tokens, losses, decoys and their losses of some rows; a few are missing."""
    size, width = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    answers = [f"{number}" for number in rng.integers(0, draw(st.integers(1, 6)), size)]
    tokens = np.array([1 + int(text) for text in answers], np.float64)
    decoys = rng.integers(-1, size, (size, width))
    loss = np.where(rng.random(size) < 0.1, np.nan, rng.random(size) * 9)
    decoy_loss = np.where((decoys < 0) | (rng.random(decoys.shape) < 0.1), np.nan, rng.random(decoys.shape) * 9)
    return answers, tokens, loss, decoys, decoy_loss


@settings(max_examples=200)
@given(compared())
def test_margins_are_those_of_sums_by_hand(case):
    answers, tokens, loss, decoys, decoy_loss = case
    result = margins(*case)
    asked = [
        [(other, value) for other, value in zip(*pair, strict=True) if other >= 0 and value == value]
        for pair in zip(decoys, decoy_loss, strict=True)
    ]
    every = [pair for pairs in asked for pair in pairs]
    per_token = sum(value for _, value in every) / max(sum(tokens[other] for other, _ in every), 1)

    def usual(row):
        losses = [value for other, value in every if answers[other] == answers[row]]
        return (sum(losses) + 10 * per_token * tokens[row]) / (len(losses) + 10)

    for row, pairs in enumerate(asked):
        if not pairs or np.isnan(loss[row]):
            assert np.isnan([result.score[row], result.other_loss[row], result.usual[row]]).all()
            assert result.other[row] == -1
            continue
        gain, other, value = max((usual(other) - value, other, value) for other, value in pairs)
        assert result.score[row] == pytest.approx(gain - (usual(row) - loss[row]), abs=1e-9)
        assert (result.other_loss[row], result.usual[row]) == (
            pytest.approx(value, abs=1e-9),
            pytest.approx(usual(row), abs=1e-9),
        )
        assert answers[result.other[row]] == answers[other]


def test_an_answer_that_is_likely_after_any_prompt_has_no_advantage():
    """The second answer is likelier than the first after each prompt, but less so after the prompts of the first."""
    answers = ["a", "b"] * 50
    loss = np.where(np.arange(100) % 2, 0.5, 2.0)
    decoys = np.array([[1], [0]] * 50)
    decoy_loss = np.where(np.arange(100) % 2, 6.0, 1.5)[:, None]
    raw = loss - decoy_loss[:, 0]
    assert (raw[::2] > 0).all()
    assert (margins(answers, np.ones(100), loss, decoys, decoy_loss).score < 0).all()
