"""Scores of rows, and the choice of rows by them, against sums by hand."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from siftune.sifting.choose import choose_by_losses, choose_by_margins, lowest, separation, unlike
from siftune.sifting.pool import held_out_count

LOSSES = st.floats(-20, 20, width=32)
MANY = st.lists(LOSSES, min_size=1, max_size=60)
FEW = st.lists(LOSSES, min_size=1, max_size=20)
SCORED = st.lists(st.tuples(LOSSES, st.booleans()), min_size=1, max_size=60)


def parts(rows):
    """Scores, and whether rows are of the task."""
    return np.array([score for score, _ in rows]), np.array([task for _, task in rows])


@given(SCORED, st.integers(0, 70))
def test_the_lowest_are_those_of_the_task_and_the_first_of_equal_ones(rows, count):
    values, task = parts(rows)
    chosen = lowest(values, count, task).nonzero()[0].tolist()
    assert chosen == sorted(sorted(range(len(rows)), key=lambda i: (not task[i], values[i], i))[:count])


OF_TASK = SCORED.filter(lambda rows: any(of_it for _, of_it in rows))


HIGHER = st.lists(st.floats(2, 20, width=32), min_size=8, max_size=60)  # decoys that are often above the target


@given(OF_TASK, FEW, st.lists(LOSSES, max_size=60) | HIGHER)
@example([(9.0, True), (1.0, True), (1.0, False), (3.0, True)], [0.1, 0.2], [2.0] * 2 + [4.0] * 10)
@example([(9.0, True), (1.0, True), (1.0, False), (3.0, True)], [0.1, 3.0], [2.0] * 2 + [4.0] * 10)
@example([(9.0, True), (1.0, True), (1.0, False), (3.0, True)], [0.1, 5.0], [2.0] * 2 + [4.0] * 10)
def test_the_choice_is_that_of_exact_arithmetic(rows, target, decoys):
    values, task = parts(rows)
    own = [value for value, of_it in zip(values, task, strict=True) if of_it]
    limit = next(each for each in sorted(target) if sum(v <= each for v in target) >= 0.8 * (len(target) - 1) + 1)
    pairs = [Fraction(1) if d > t else Fraction(1, 2) if d == t else Fraction(0) for d in decoys for t in target]
    middle = sorted(decoys)[round(0.3 * len(decoys)) : round(0.7 * len(decoys))]
    shares = []
    for rows in (own, target):
        each = [
            Fraction(sum(v >= t for v in rows) * len(decoys), len(rows) * sum(d >= t for d in decoys)) for t in middle
        ]
        shares.append(min(each, default=Fraction(0)))
    excess = shares[0] - shares[1]
    assume(excess != Fraction(1, 20) or not shares[1])  # a difference of floats is rounded
    expected = list(task)
    if len(decoys) >= 8 and sum(pairs) / len(pairs) >= Fraction(3, 5) and excess >= Fraction(1, 20):
        limit = max(limit, sorted(decoys)[(len(decoys) - 1) // 10])
        expected = [of_it and value <= limit for value, of_it in zip(values, task, strict=True)]
    assert choose_by_losses(values, np.array(target), np.array(decoys), task).rows_R.tolist() == expected


def test_rows_above_the_limit_are_left_out_if_rows_are_as_unlikely_as_decoys():
    target, decoys, task = np.array([0.1] * 8 + [0.5, 3.0]), np.full(8, 4.0), np.ones(100, bool)
    for unlikely, left_out in ((5, 5), (4, 0)):
        pool = np.repeat([0.2, 0.5, 0.6, 4.5], [90, 9 - unlikely, 1, unlikely])
        choice = choose_by_losses(pool, target, decoys, task)
        assert (~choice.rows_R).sum() == left_out
        assert ("none is left out: 4.0%" in choice.reason) == (not left_out)


def test_nothing_is_left_out_if_as_many_held_out_rows_are_as_unlikely_as_decoys():
    pool, task, decoys = np.repeat([0.2, 4.5], [70, 30]), np.ones(100, bool), np.full(8, 4.0)
    few, many = (choose_by_losses(pool, np.repeat([0.1, 4.2], [16 - n, n]), decoys, task) for n in (3, 5))
    assert few.rows_R.tolist() == (pool < 4).tolist()
    assert many.rows_R.all()
    assert "30.0% of the rows and 31.2% of the held-out" in many.reason


def test_the_limit_is_the_higher_of_those_by_held_out_rows_and_by_decoys():
    pool, task, decoys = np.arange(10.0), np.ones(10, bool), np.array([2.5, 3.0, *[5.0] * 9])
    for held_out, limit in ((1.0, 3.0), (4.0, 4.0)):
        choice = choose_by_losses(pool, np.full(5, held_out), decoys, task)
        assert choice.limit == limit
        assert choice.rows_R.tolist() == (pool <= limit).tolist()


def test_nothing_is_left_out_if_decoys_are_few_or_as_likely_as_held_out_rows():
    target, pool, task = np.array([0.1] * 8 + [0.5, 3.0]), np.array([0.2] * 5 + [9.5] * 5), np.ones(10, bool)
    reason = choose_by_losses(pool, target, np.full(8, 0.1), task).reason
    assert "cannot tell right completions" in reason
    assert "too few" in choose_by_losses(pool, target, np.full(7, 9.0), task).reason
    for decoys in (np.full(8, 0.1), np.full(7, 9.0), np.empty(0)):
        assert choose_by_losses(pool, target, decoys, task).rows_R.all()
    assert not choose_by_losses(pool, target, np.full(8, 9.0), task).rows_R.all()


SOME = st.one_of(LOSSES, st.just(float("nan")))


@given(
    st.lists(st.tuples(SOME, st.booleans(), st.integers(-1, 2)), min_size=1, max_size=60), st.lists(SOME, max_size=20)
)
def test_the_choice_by_margins_is_that_of_exact_arithmetic(rows, held_out):
    values, task = parts([row[:2] for row in rows])
    answers = [answer for _, _, answer in rows]
    if not task.any():
        task[0] = True
    beyond = [bool(of_it and value > 1) for value, of_it in zip(values, task, strict=True)]
    compared = [value for value in held_out if value == value]  # not NaN
    expected = task.tolist()
    right = sum(value <= 1 for value in compared)
    limited = bool(len(compared) >= 8 and 5 * right >= 3 * len(compared) and 100 * sum(beyond) >= 3 * task.sum())
    if limited:
        expected = [bool(of_it) and not gone for of_it, gone in zip(task, beyond, strict=True)]
        for answer in (0, 1, 2):
            own = [number for number in range(len(rows)) if task[number] and answers[number] == answer]
            own.sort(key=lambda number: -np.inf if values[number] != values[number] else values[number])
            for number in own[: -(-2 * len(own) // 5)]:
                expected[number] = True
    choice = choose_by_margins(values, np.array(held_out, np.float64), task, np.array(answers))
    assert choice.rows_R.tolist() == expected
    assert choice.limit == (1.0 if limited else None)
    is_compared, is_right = len(compared) >= 8, 5 * right >= 3 * len(compared)
    reasons = {
        "hardly any answer looks wrong, and none is left out": is_compared and is_right and not limited,
        "cannot tell right answers from wrong ones, and none is left out": is_compared and not is_right,
        "too few rows": not is_compared,
    }
    assert {reason: reason in choice.reason for reason in reasons} == reasons


@pytest.mark.parametrize(("margin", "warned"), [(2.9, True), (3.0, False)])
def test_margins_that_are_mostly_small_are_reported(margin, warned):
    pool, answers = np.array([-5.0] * 9 + [1.5, 9.0] * 4 + [margin]), np.full(18, -1)
    choice = choose_by_margins(pool, np.full(8, -1.0), np.ones(18, bool), answers)
    assert choice.rows_R.tolist() == [True] * 9 + [False] * 9
    assert ("compare with a training on all rows" in choice.reason) == warned


@given(FEW, st.lists(LOSSES, max_size=20))
def test_pairs_in_order_are_counted_one_by_one(target, decoys):
    pairs = [(d > t) + (d == t) / 2 for d in decoys for t in target]
    expected = sum(pairs) / len(pairs) if pairs else 0.5
    assert separation(np.array(decoys), np.array(target)) == pytest.approx(expected, abs=1e-12)


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
