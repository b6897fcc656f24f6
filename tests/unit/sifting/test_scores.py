"""Scores of rows, the rows with the lowest, and their number, against sums by hand."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftune.sifting.scores import choose, held_out_count, lowest, scores, unlike

LOSSES = st.floats(-20, 20, width=32)
MANY = st.lists(LOSSES, min_size=1, max_size=60)
FEW = st.lists(LOSSES, min_size=1, max_size=20)


def test_a_score_is_the_change_of_the_loss():
    found = scores(np.array([0.25, 3.0, 1.0]), np.array([1.5, 2.0, 1.0]))
    assert found.dtype == np.float64
    assert found.tolist() == [-1.25, 1.0, 0.0]


@given(MANY, st.integers(0, 70))
def test_the_lowest_are_the_first_of_equal_ones_in_order(values, count):
    chosen = lowest(np.array(values), count).tolist()
    assert chosen == sorted(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])


def test_of_equal_scores_the_first_are_chosen():
    assert lowest(np.zeros(5), 2).tolist() == [0, 1]


@given(MANY, FEW)
def test_the_choice_is_that_of_exact_arithmetic(pool, target):
    below, of_target = sum(score < 0 for score in pool), Fraction(sum(score < 0 for score in target), len(target))
    trusted = of_target >= Fraction(1, 2) and below < of_target * len(pool)
    if below != of_target * len(pool):  # float64 may round the product past a number of rows
        assert choose(np.array(pool), np.array(target)).rows == (below if trusted else len(pool))


@given(MANY, FEW, st.randoms())
def test_the_choice_does_not_depend_on_the_order(pool, target, random):
    before = choose(np.array(pool), np.array(target))
    random.shuffle(pool)
    random.shuffle(target)
    assert choose(np.array(pool), np.array(target)) == before


def test_a_pool_like_the_target_is_selected_in_full():
    drawn = np.random.default_rng(0).normal(-0.5, size=400)
    target = np.sort(drawn)[::10]
    assert choose(drawn, target).rows == 400
    assert choose(np.concatenate([drawn, drawn + 50]), target).rows == (drawn < 0).sum()


@pytest.mark.parametrize(
    ("target", "rows"), [([-1, -1, 1, 1], 3), ([-1, 1, 1, 1], 8), ([-1, -1, -1, 1], 3), ([0, 0, -1, -1], 3)]
)
def test_the_pool_is_sifted_if_half_of_the_target_became_more_likely(target, rows):
    pool = np.array([-1.0] * 3 + [0.0] + [1.0] * 4)  # a score of 0 is not below 0
    choice = choose(pool, np.array(target, dtype=float))
    assert choice.rows == rows
    assert choice.reason


def test_no_row_of_a_pool_may_be_selected():
    assert choose(np.ones(8), -np.ones(8)).rows == 0


@given(st.integers(8, 10_000))
def test_rows_held_out_of_the_target(rows):
    held_out = held_out_count(rows)
    assert 4 <= held_out <= rows / 2
    assert held_out in (rows // 2, 8, rows // 5)


@given(MANY, FEW)
def test_rows_within_the_limit_of_the_bad_ones_are_left_out(pool, bad):
    limit = next(each for each in sorted(bad) if sum(score <= each for score in bad) >= 0.9 * len(bad))
    within = sum(score <= limit for score in pool)
    assert unlike(np.array(pool), np.array(bad)).rows == len(pool) - (within if within <= 0.6 * len(pool) else 0)


def test_a_pool_like_the_bad_rows_is_left_as_it_is():
    drawn = np.random.default_rng(0).normal(size=400)
    assert unlike(drawn, drawn[:40]).rows == 400
    apart = np.concatenate([drawn, drawn + 50])
    assert abs(unlike(np.concatenate([apart, drawn + 100]), drawn[:40]).rows - (1200 - 360)) <= 20
