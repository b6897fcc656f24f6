"""Scores of rows, and the choice of rows by them, against sums by hand."""

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from siftune.sifting.scores import choose, held_out_count, lowest, of_task, scores, unlike

LOSSES = st.floats(-20, 20, width=32)
MANY = st.lists(LOSSES, min_size=1, max_size=60)
FEW = st.lists(LOSSES, min_size=1, max_size=20)
SCORED = st.lists(st.tuples(LOSSES, st.booleans()), min_size=1, max_size=60)


def parts(rows):
    """Scores, and whether rows are of the task."""
    return np.array([score for score, _ in rows]), np.array([task for _, task in rows])


def test_a_score_is_the_change_of_the_loss():
    found = scores(np.array([0.25, 3.0, 1.0]), np.array([1.5, 2.0, 1.0]))
    assert found.dtype == np.float64
    assert found.tolist() == [-1.25, 1.0, 0.0]


@given(SCORED, st.integers(0, 70))
def test_the_lowest_are_those_of_the_task_and_the_first_of_equal_ones(rows, count):
    values, task = parts(rows)
    chosen = lowest(values, count, task).nonzero()[0].tolist()
    assert chosen == sorted(sorted(range(len(rows)), key=lambda i: (not task[i], values[i], i))[:count])


def test_rows_of_the_task_have_prompts_as_similar_as_all_held_out_rows():
    assert of_task(np.array([0.7, 0.69, -1.0, 1.0]), np.array([0.9, 0.7, 0.8])).tolist() == [True, False, False, True]


@given(SCORED, FEW)
def test_the_choice_is_that_of_exact_arithmetic(rows, target):
    values, task = parts(rows)
    own = [value for value, of_it in zip(values, task, strict=True) if of_it]
    expected = task
    if 2 * sum(v >= 0 for v in target) >= len(target):
        expected = [True] * len(task)
    elif own:
        excess = Fraction(sum(v >= 0 for v in own), len(own)) - Fraction(sum(v >= 0 for v in target), len(target))
        if abs(excess - Fraction(1, 10)) < Fraction(1, 10**9):  # float64 may round the difference past a tenth
            return
        if excess > Fraction(1, 10):
            expected = [of_it and value < 0 for value, of_it in zip(values, task, strict=True)]
    assert choose(values, np.array(target), task).rows_R.tolist() == list(expected)


def test_rows_that_contradict_the_target_are_left_out_only_if_there_are_more_than_held_out_ones():
    task, pool = np.ones(10, bool), np.array([-1.0] * 6 + [0.0] + [1.0] * 3)  # 40 % are not below 0
    assert choose(pool, np.array([-1.0, -1, -1, 1]), task).rows_R.tolist() == [True] * 6 + [False] * 4
    assert choose(pool, np.array([-1.0, -1, 1]), task).rows_R.all()


def test_all_rows_are_kept_if_the_training_made_half_of_the_held_out_rows_less_likely():
    task, pool = np.array([True] * 9 + [False]), np.array([-1.0] + [1.0] * 9)
    assert choose(pool, np.array([-9.0] * 4 + [0.1] * 4), task).rows_R.all()
    assert choose(pool, np.array([-9.0] * 4 + [0.1] * 4), ~task & task).rows_R.all()  # also if no prompt is like it
    assert choose(pool, np.array([-0.1] * 5 + [9.0] * 4), task).rows_R.tolist() == [True] + [False] * 9


def test_no_row_may_be_of_the_task():
    assert not choose(-np.ones(8), -np.ones(8), np.zeros(8, bool)).rows_R.any()


@given(st.integers(8, 10_000))
def test_rows_held_out_of_the_target(rows):
    held_out = held_out_count(rows)
    assert 4 <= held_out <= rows / 2
    assert held_out in (rows // 2, 8, rows // 5)


@given(MANY, FEW)
def test_rows_like_the_bad_ones_are_left_out(pool, bad):
    limit = next(each for each in sorted(bad) if sum(score <= each for score in bad) >= 0.9 * len(bad))
    within, likely = [score <= limit for score in pool], [score < 0 for score in pool]
    stand_out = sum(score < 0 for score in bad) > len(bad) / 2
    gone = next((part for part in (within, likely) if sum(part) <= 0.6 * len(pool)), [])
    remaining = [not is_gone for is_gone in gone] if stand_out and gone else [True] * len(pool)
    assert unlike(np.array(pool), np.array(bad)).rows_R.tolist() == remaining


def test_bad_rows_that_do_not_stand_out_leave_the_pool_as_it_is():
    pool = np.array([-2.0] * 3 + [-1.0] * 3 + [0.0] * 4)
    assert unlike(pool, np.array([-1.5] * 8)).rows_R.tolist() == [False] * 3 + [True] * 7
    assert unlike(pool, np.array([-1.0] * 5 + [9.0] * 3)).rows_R.tolist() == [False] * 6 + [True] * 4
    assert unlike(pool, np.array([-1.0] * 4 + [0.0] * 4)).rows_R.all()
    assert unlike(np.append(pool, -1.0), np.array([0.0] + [-1.0] * 7)).rows_R.all()
