import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftune.evaluate.compare import paired_bootstrap
from siftune.evaluate.intervals import Bootstrap, Estimate, Means, drawn_counts, resample

FEW = Bootstrap(resamples=200, seed=3)


def by_hand(columns, weights, draws, bootstrap=FEW):
    """Every resample row by row: the means of each column, from the same draws."""
    rng = np.random.default_rng(bootstrap.seed)
    rows = len(weights)
    means = []
    for _ in range(draws):
        picked = [i for i, times in enumerate(rng.multinomial(rows, [1 / rows] * rows)) for _ in range(times)]
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


def test_draws_whose_whole_is_zero_do_not_count():
    means = Means({"a": 1.0, "b": 0.0, "w": 1.0}, dict.fromkeys("ab", np.zeros(100)), Bootstrap())
    means.draws["w"] = np.array([0.0] * 2 + [1.0] * 98)  # one in fifty: the interval is above zero
    found = means.share("a", "b", "w")
    assert found == Estimate(1.0, 0.0, 0.0)
    assert not any(math.isnan(bound) for bound in (found.low, found.high))


def test_agrees_with_the_paired_bootstrap():
    rng = np.random.default_rng(1)
    base, tuned = rng.normal(size=(2, 200))
    weights = rng.integers(1, 9, 200)
    wanted = paired_bootstrap(base, tuned, 20_000, weights=weights)
    found = resample({"base": base, "tuned": tuned}, weights, Bootstrap(20_000)).difference("tuned", "base")
    assert found.value == pytest.approx(wanted.difference)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.002)


def test_rows_without_weight_give_no_mean():
    found = resample({"a": [3.0, 0.0]}, [1, 0], FEW).mean("a")
    assert found == Estimate(3.0, 3.0, 3.0)


def test_chunks_do_not_matter(monkeypatch):
    columns = {"a": np.arange(7.0)}
    whole = resample(columns, None, FEW)
    monkeypatch.setattr("siftune.evaluate.intervals._CELLS", 20)
    assert len(list(drawn_counts(np.ones(7, dtype=int), 200, np.random.default_rng(0)))) == 100
    np.testing.assert_array_equal(resample(columns, None, FEW).draws["a"], whole.draws["a"])


def test_level_and_seed():
    columns = {"a": np.random.default_rng(0).normal(size=50)}
    wide = resample(columns, None, Bootstrap(500, 0.95)).mean("a")
    narrow = resample(columns, None, Bootstrap(500, 0.5)).mean("a")
    assert wide.low < narrow.low < narrow.high < wide.high
    assert resample(columns, None, Bootstrap(500, 0.95)).mean("a") == wide
    assert resample(columns, None, Bootstrap(500, 0.95, seed=1)).mean("a") != wide


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
def test_refusals(columns, weights, words):
    with pytest.raises(ValueError, match=words):
        resample(columns, weights)


@pytest.mark.parametrize(("resamples", "level"), [(0, 0.95), (10, 0.0), (10, 1.0)])
def test_bootstrap_ranges(resamples, level):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Bootstrap(resamples, level)
