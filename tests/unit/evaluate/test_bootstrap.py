"""Intervals against loops over single draws."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftune.evaluate.bootstrap import (
    Bootstrap,
    Estimate,
    Means,
    accuracy_interval,
    chunks,
    paired_bootstrap,
    resample,
)

BASE = np.array([0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
TUNED = np.array([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0])
WEIGHTS = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])


def loop(base, tuned, weights, f, resamples, level, seed):
    """One draw at a time, with the same generator."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(base), size=(resamples, len(base)))
    differences = []
    for rows in drawn:
        weight = sum(weights[i] for i in rows)
        differences.append(f(sum(tuned[i] for i in rows) / weight) - f(sum(base[i] for i in rows) / weight))
    differences.sort()
    return np.quantile(differences, (1 - level) / 2), np.quantile(differences, (1 + level) / 2)


def test_equals_a_loop_over_draws():
    found = paired_bootstrap(BASE, TUNED, Bootstrap(500, 0.8, 3))
    low, high = loop(BASE, TUNED, np.ones(7), float, 500, 0.8, 3)
    assert found.value == pytest.approx(1 / 7)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_equals_a_loop_with_weights_and_transform():
    found = paired_bootstrap(BASE, TUNED, Bootstrap(500, seed=1), weights=WEIGHTS, transform=np.exp)
    low, high = loop(BASE, TUNED, WEIGHTS, np.exp, 500, 0.95, 1)
    assert found.value == pytest.approx(np.exp(4 / 28) - np.exp(3 / 28))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_draws_without_weight_do_not_count():
    assert paired_bootstrap([0, 2], [0, 4], Bootstrap(200), weights=[0, 1]) == Estimate(2, 2, 2)
    assert resample({"a": [3.0, 0.0]}, [1, 0], Bootstrap(200)).mean("a") == Estimate(3, 3, 3)


def test_drawing_in_parts_changes_nothing(monkeypatch):
    whole = paired_bootstrap(BASE, TUNED, Bootstrap(301, seed=5))
    monkeypatch.setattr("siftune.evaluate.bootstrap._CELLS", 70)
    assert paired_bootstrap(BASE, TUNED, Bootstrap(301, seed=5)) == whole


def test_the_seed_decides_and_the_global_generator_does_not():
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    rng = np.random.default_rng(0)
    base, tuned = rng.normal(size=(2, 50))
    first = paired_bootstrap(base, tuned, Bootstrap(200, seed=1))
    assert first == paired_bootstrap(base, tuned, Bootstrap(200, seed=1))
    assert first != paired_bootstrap(base, tuned, Bootstrap(200, seed=2))
    assert (np.random.get_state()[1] == state).all()


def test_coverage_on_synthetic_data():
    # 400 intervals at 90 %: the rate of those that hold the truth has a standard error of 1.5 points
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(400):
        base = rng.random(80) < 0.5
        tuned = np.where(rng.random(80) < 0.4, rng.random(80) < 0.9, base)  # truth: 0.4·(0.9 − 0.5)
        found = paired_bootstrap(base, tuned, Bootstrap(300, 0.9, trial))
        hits += found.low <= 0.16 <= found.high
    assert 0.84 <= hits / 400 <= 0.96


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (([], []), {}),
        (([1.0], [1.0, 2.0]), {}),
        (([[1.0]], [[1.0]]), {}),
        (([1.0], [float("nan")]), {}),
        (([1.0], [1.0]), {"weights": [0.0]}),
        (([1.0], [1.0]), {"weights": [-1.0]}),
    ],
)
def test_unpairable_values_are_refused(arguments, options):
    with pytest.raises(ValueError, match=r"shape|finite|at least"):
        paired_bootstrap(*arguments, **options)


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    # textbook values of the Wilson interval at 95 %
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson(right, rows, low, high):
    found = accuracy_interval(np.arange(rows) < right)
    assert found == pytest.approx((low, high), abs=5e-5)


@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.floats(0.5, 0.99))
def test_wilson_holds_the_rate_and_solves_its_equation(correct, level):
    low, high = accuracy_interval(correct, level)
    rate = np.mean(correct)
    assert 0 <= low <= rate + 1e-12
    assert rate - 1e-12 <= high <= 1
    z = NormalDist().inv_cdf((1 + level) / 2)
    for bound in (low, high):
        # Wilson: |rate − bound| is z standard errors of the bound
        assert (rate - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / len(correct), abs=1e-9)


# --- several models ---

FEW = Bootstrap(resamples=200, seed=3)


def by_hand(columns, weights, draws, bootstrap=FEW):
    """Every resample row by row: the means of each column, from the same draws."""
    rng = np.random.default_rng(bootstrap.seed)
    rows = len(weights)
    means = []
    for picked in rng.integers(0, rows, size=(draws, rows)):
        total = sum(weights[i] for i in picked)
        means.append([sum(column[i] for i in picked) / total for column in columns])
    return np.array(means)


values = st.lists(st.tuples(*[st.floats(-5, 5)] * 4, st.integers(1, 6)), min_size=1, max_size=8)


@given(values)
def test_every_figure_follows_from_the_same_draws(rows):
    *columns, weights = zip(*rows, strict=True)
    names = "abcd"
    means = resample(dict(zip(names, columns, strict=True)), weights, FEW)
    draws = by_hand(columns, weights, FEW.resamples)
    for i, name in enumerate(names):
        np.testing.assert_allclose(means.draws[name], draws[:, i], rtol=0, atol=1e-12)
        exact = sum(columns[i]) / sum(weights)
        found = means.mean(name)
        assert found.value == pytest.approx(exact, abs=1e-12)
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws[:, i], [0.025, 0.975])), abs=1e-12)
    gap = draws[:, 0] - draws[:, 2]
    found = means.difference("a", "c")
    assert found.value == pytest.approx((sum(columns[0]) - sum(columns[2])) / sum(weights), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(gap, [0.025, 0.975])), abs=1e-12)


def test_a_share_is_the_ratio_of_two_differences_on_each_draw():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30))
    columns = [a + 1, b, a + 2]
    draws = by_hand(columns, [1] * 30, FEW.resamples)
    found = resample(dict(zip("abw", columns, strict=True)), None, FEW).share("a", "b", "w")
    ratio = (draws[:, 0] - draws[:, 1]) / (draws[:, 2] - draws[:, 1])
    assert found.value == pytest.approx((a.mean() + 1 - b.mean()) / (a.mean() + 2 - b.mean()))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(ratio, [0.025, 0.975])))
    assert found.low < found.value < found.high


def test_a_share_of_nothing_is_not_defined():
    rng = np.random.default_rng(0)
    a, noise = rng.normal(size=(2, 40))
    columns = {"a": a, "b": a, "same": a, "less": a - 1, "barely": a + noise + 0.05 - noise.mean(), "more": a + 1}
    means = resample(columns, None, FEW)
    assert means.share("a", "b", "same") == Estimate(None, None, None)
    assert means.share("a", "b", "less") == Estimate(None, None, None)
    barely = means.share("more", "b", "barely")
    assert barely.value == pytest.approx(20)
    assert (barely.low, barely.high) == (None, None)
    assert means.share("more", "b", "more") == Estimate(1.0, 1.0, 1.0)


def test_draws_with_a_denominator_of_zero_do_not_count():
    means = Means({"a": 1.0, "b": 0.0, "w": 1.0}, dict.fromkeys("ab", np.zeros(100)), Bootstrap())
    means.draws["w"] = np.array([0.0] * 2 + [1.0] * 98)  # one in fifty: the interval is above zero
    found = means.share("a", "b", "w")
    assert found == Estimate(1.0, 0.0, 0.0)
    assert not any(math.isnan(bound) for bound in (found.low, found.high))


def test_chunks_do_not_matter(monkeypatch):
    columns = {"a": np.arange(7.0)}
    whole = resample(columns, None, FEW)
    monkeypatch.setattr("siftune.evaluate.bootstrap._CELLS", 20)
    assert [*chunks(200, 7)] == [2] * 100
    np.testing.assert_array_equal(resample(columns, None, FEW).draws["a"], whole.draws["a"])


@pytest.mark.parametrize(
    ("columns", "weights", "words"),
    [
        ({}, None, "one value per row"),
        ({"a": []}, None, "one value per row"),
        ({"a": [1.0], "b": [1.0, 2.0]}, None, "one value per row"),
        ({"a": [1.0]}, [1.0, 1.0], r"weights have the shape \(2,\)"),
        ({"a": [math.nan]}, None, "finite"),
        ({"a": [1.0]}, [math.inf], "finite"),
        ({"a": [1.0, 1.0]}, [2.0, -1.0], "at least 0"),
        ({"a": [1.0]}, [0.0], "not all 0"),
    ],
)
def test_unusable_values_are_refused(columns, weights, words):
    with pytest.raises(ValueError, match=words):
        resample(columns, weights)
