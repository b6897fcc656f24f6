from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftune.evaluate import compare
from siftune.evaluate.compare import accuracy_interval, paired_bootstrap

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
    found = paired_bootstrap(BASE, TUNED, resamples=500, level=0.8, seed=3)
    low, high = loop(BASE, TUNED, np.ones(7), float, 500, 0.8, 3)
    assert found.difference == pytest.approx(1 / 7)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_equals_a_loop_with_weights_and_transform():
    found = paired_bootstrap(BASE, TUNED, resamples=500, seed=1, weights=WEIGHTS, transform=np.exp)
    low, high = loop(BASE, TUNED, WEIGHTS, np.exp, 500, 0.95, 1)
    assert found.difference == pytest.approx(np.exp(4 / 28) - np.exp(3 / 28))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_drawing_in_parts_changes_nothing(monkeypatch):
    whole = paired_bootstrap(BASE, TUNED, resamples=301, seed=5)
    monkeypatch.setattr(compare, "_CELLS", 70)
    assert paired_bootstrap(BASE, TUNED, resamples=301, seed=5) == whole


def test_the_seed_decides_and_the_global_generator_does_not():
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    rng = np.random.default_rng(0)
    base, tuned = rng.normal(size=(2, 50))
    first = paired_bootstrap(base, tuned, resamples=200, seed=1)
    assert first == paired_bootstrap(base, tuned, resamples=200, seed=1)
    assert first != paired_bootstrap(base, tuned, resamples=200, seed=2)
    assert (np.random.get_state()[1] == state).all()


def test_equal_models_give_an_interval_of_nothing():
    found = paired_bootstrap(TUNED, TUNED, resamples=100)
    assert (found.difference, found.low, found.high) == (0, 0, 0)


@pytest.mark.parametrize("rows", [1, 30])
def test_all_rows_improve_alike(rows):
    found = paired_bootstrap(np.zeros(rows), np.ones(rows), resamples=100)
    assert (found.difference, found.low, found.high) == (1, 1, 1)


def test_draws_without_weight_are_left_out():
    found = paired_bootstrap([0, 2], [0, 4], resamples=200, weights=[0, 1])
    assert (found.difference, found.low, found.high) == (2, 2, 2)


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(0)
    hardness = rng.normal(size=200)
    base, tuned = hardness, hardness + 0.1 + 0.1 * rng.normal(size=200)
    paired = paired_bootstrap(base, tuned, resamples=500)
    shuffled = paired_bootstrap(base, rng.permutation(tuned), resamples=500)
    assert (paired.high - paired.low) < 0.3 * (shuffled.high - shuffled.low)


def test_coverage_on_synthetic_data():
    # 400 intervals at 90 %: the rate of those that hold the truth has a standard error of 1.5 points
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(400):
        base = rng.random(80) < 0.5
        tuned = np.where(rng.random(80) < 0.4, rng.random(80) < 0.9, base)  # truth: 0.4·(0.9 − 0.5)
        found = paired_bootstrap(base, tuned, resamples=300, level=0.9, seed=trial)
        hits += found.low <= 0.16 <= found.high
    assert 0.84 <= hits / 400 <= 0.96


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (([], []), {}),
        (([1.0], [1.0, 2.0]), {}),
        (([[1.0]], [[1.0]]), {}),
        (([1.0], [float("nan")]), {}),
        (([1.0], [1.0]), {"level": 1.0}),
        (([1.0], [1.0]), {"resamples": 0}),
        (([1.0], [1.0]), {"weights": [0.0]}),
        (([1.0], [1.0]), {"weights": [-1.0]}),
    ],
)
def test_refuses(arguments, options):
    with pytest.raises(ValueError, match=r"shapes|finite|between"):
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


@pytest.mark.parametrize(("correct", "level"), [([], 0.95), ([True], 1.0), ([[True]], 0.95)])
def test_wilson_refuses(correct, level):
    with pytest.raises(ValueError, match="one row or more"):
        accuracy_interval(correct, level)
