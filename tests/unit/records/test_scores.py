"""Scores of rows against loops over their visits."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftune.records import scores
from siftune.records.scores import by_row, by_time, course, seen

LOSSES = st.lists(st.one_of(st.floats(0, 20), st.just(float("nan"))), min_size=1, max_size=60)


def slow_apart(values, steps, window):
    """Visit by visit: grow the window of whole steps on either side."""
    apart = []
    for at, value in enumerate(values):
        same = [i for i, step in enumerate(steps) if step == steps[at]]
        sides = -(-max(0, window - len(same)) // 2)
        low, high = max(0, same[0] - sides), min(len(values) - 1, same[-1] + sides)
        company = [values[i] for i, step in enumerate(steps) if steps[low] <= step <= steps[high]]
        company = [each for each in company if not np.isnan(each)]
        apart.append(value - np.median(company) if company else np.nan)
    return apart


def slow_z(apart):
    distances = [abs(each) for each in apart if not np.isnan(each)]
    size = 1.4826 * np.median(distances) if distances else 0
    if distances and size <= 1e-6:
        size = 1.2533 * np.mean(distances)
    return [0 * each if size <= 1e-6 else each / size for each in apart]


@given(LOSSES, st.lists(st.tuples(st.integers(0, 8), st.integers(0, 9)), min_size=60, max_size=60), st.integers(1, 30))
def test_scores_are_those_of_a_loop(values, visits, window):
    visits = sorted(visits[: len(values)], key=lambda visit: visit[0])
    steps, rows = (np.array(column) for column in zip(*visits, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "WINDOW", window)
        z, by_rows = by_time(np.array(values), steps), by_row(rows, np.array(values), steps)
    apart = slow_apart(values, steps, window)
    np.testing.assert_allclose(z, slow_z(apart), rtol=1e-3, atol=1e-5)
    means = []
    for row in sorted(set(rows.tolist())):
        own = [each for each, other in zip(apart, rows, strict=True) if other == row and not np.isnan(each)]
        means.append(np.mean(own) if own else np.nan)
    np.testing.assert_allclose(by_rows, slow_z(means), rtol=1e-3, atol=1e-5)


def test_a_trend_is_no_reason():
    rng = np.random.default_rng(0)
    steps = np.repeat(np.arange(100), 16)
    losses = 5.0 - 0.04 * steps + rng.normal(0, 0.2, len(steps))
    losses[1500] += 1.5  # a wrong row that is seen late costs less than any right one at first
    assert losses[1500] < losses[:100].min()
    assert by_time(losses, steps).argmax() == 1500


def test_rows_that_are_not_learned_yet_stand_behind_wrong_ones():
    """In its own time's spread a late row that costs what all did at first would stand before an early wrong one."""
    rng = np.random.default_rng(0)
    steps = np.repeat(np.arange(100), 16)
    spread = np.where(steps < 60, 1.0, 0.05)
    losses = np.abs(rng.normal(0, 1, len(steps))) * spread
    losses[[100, 1400]] = 4.0, 1.0
    z = by_time(losses, steps)
    assert z[100] > z[1400]
    assert (z / spread)[100] < (z / spread)[1400]


def test_what_is_learned_last_stands_out_over_epochs():
    rng = np.random.default_rng(0)
    rows, steps = np.tile(np.arange(200), 4), np.repeat(np.arange(80), 10)
    losses = np.abs(rng.normal(2, 1, 800)) * np.repeat([1, 0.5, 0.2, 0.1], 200)
    wrong = np.arange(20) * 10
    losses[np.isin(rows, wrong)] = 2.0  # at first sight there is nothing about them
    found = by_row(rows, losses, steps)
    assert set(np.argsort(-found)[:20]) == set(wrong)
    assert set(np.argsort(-by_time(losses, steps)[:200])[:20]) != set(wrong)


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=50))
def test_kinds_are_looked_at_one_by_one(visits):
    values, rows, kinds = (np.array(column) for column in zip(*visits, strict=True))
    steps, rows = np.arange(len(values)) // 4, rows + 10 * kinds
    z, by_rows = by_time(values, steps, kinds), by_row(rows, values, steps, kinds)
    for kind in set(kinds.tolist()):
        own = kinds == kind
        assert np.array_equal(z[own], by_time(values[own], steps[own]))
        assert np.array_equal(by_rows[np.unique(rows) // 10 == kind], by_row(rows[own], values[own], steps[own]))


def test_many_wrong_rows_stand_out_all_the_same():
    rng = np.random.default_rng(1)
    losses = rng.normal(1, 0.1, 400)
    losses[:120] += 2
    z = by_time(rng.permuted(losses), np.repeat(np.arange(25), 16))
    assert (z > 3).sum() == pytest.approx(120, abs=5)


def test_nothing_was_seen():
    assert len(by_time(np.zeros(0), np.zeros(0, dtype=int))) == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 9), st.floats(-3, 3)), min_size=1, max_size=40))
def test_the_course_is_that_of_a_loop(visits):
    rows, losses, z = (np.array(column) for column in zip(*visits, strict=True))
    found, gathered = course(rows, losses, z), seen(rows)
    for at, row in enumerate(gathered.rows):
        mine = [i for i in range(len(rows)) if rows[i] == row]
        assert gathered.first[at] == mine[0]
        assert gathered.visits[at] == len(mine)
        assert found.mean[at] == pytest.approx(losses[mine].mean(), abs=1e-6)
        assert found.variability[at] == pytest.approx(losses[mine].std(), abs=1e-6)
        assert found.forgetting[at] == sum(z[b] - z[a] > 1 for a, b in itertools.pairwise(mine))
