"""Scores of rows against loops over their visits."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftune.rows import scores
from siftune.rows.scores import at_first_sight, by_time, course, seen

LOSSES = st.lists(st.one_of(st.floats(0, 20), st.just(float("nan"))), min_size=1, max_size=60)


def slow_z(values, steps, window, counts):
    """Visit by visit: grow the window of whole steps on either side."""
    apart = []
    for at, value in enumerate(values):
        same = [i for i, step in enumerate(steps) if step == steps[at]]
        sides = -(-max(0, window - len(same)) // 2)
        low, high = max(0, same[0] - sides), min(len(values) - 1, same[-1] + sides)
        company = [values[i] for i, step in enumerate(steps) if steps[low] <= step <= steps[high]]
        company = [each for each in company if not np.isnan(each)]
        apart.append(value - np.median(company) if company else np.nan)
    distances = np.array([abs(each) for each, count in zip(apart, counts, strict=True) if count and not np.isnan(each)])
    known = [value for value in values if not np.isnan(value)]
    least = 1e-6 * max(1.0, abs(np.median(known))) if known else 0
    deviation = 1.4826 * np.median(distances) if len(distances) else 0
    if len(distances) and deviation <= least:
        deviation = 1.2533 * np.mean(distances)
    return [0 * each if deviation <= least else each / deviation for each in apart]


@given(LOSSES, st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=60, max_size=60), st.integers(1, 30))
def test_z_is_that_of_a_loop(values, visits, window):
    visits = sorted(visits[: len(values)], key=lambda visit: visit[0])
    steps, counts = (np.array(column) for column in zip(*visits, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "WINDOW", window)
        found, whole = by_time(np.array(values), steps, counts), by_time(np.array(values), steps)
    np.testing.assert_allclose(found, slow_z(values, steps, window, counts), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(whole, slow_z(values, steps, window, [True] * len(values)), rtol=1e-3, atol=1e-5)


def test_a_trend_is_no_reason():
    rng = np.random.default_rng(0)
    steps = np.repeat(np.arange(100), 16)
    losses = 5.0 - 0.04 * steps + rng.normal(0, 0.2, len(steps))
    losses[1500] += 1.5  # a wrong row that is seen late costs less than any right one at first
    assert losses[1500] < losses[:100].min()
    assert by_time(losses, steps).argmax() == 1500


def test_right_rows_that_are_not_learned_yet_are_no_suspects():
    """When most rows cost nothing, one that costs what all did at first does not stand out as a wrong one does."""
    rng = np.random.default_rng(0)
    steps = np.repeat(np.arange(100), 16)
    losses = np.abs(rng.normal(0, 1, len(steps))) * np.where(steps < 30, 1.0, 0.05)
    losses[[1400, 1500]] = 1.0, 6.0
    z = by_time(losses, steps, steps < 30)  # those at first sight
    assert z[1400] < 3 < z[1500]


@given(st.lists(st.tuples(st.floats(0, 9), st.booleans(), st.integers(0, 2)), min_size=1, max_size=50))
def test_kinds_are_looked_at_one_by_one(visits):
    values, counts, kinds = (np.array(column) for column in zip(*visits, strict=True))
    steps = np.arange(len(values)) // 4
    found = by_time(values, steps, counts, kinds)
    for kind in set(kinds.tolist()):
        own = kinds == kind
        assert np.array_equal(found[own], by_time(values[own], steps[own], counts[own]))


def test_first_sights():
    assert at_first_sight(np.array([4, 2, 4, 4, 0, 2])).tolist() == [True, True, False, False, True, False]


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
