"""GAST's scores, chances and draws against plain Python, exact chances and counts."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from siftune.base.errors import RecipeError
from siftune.methods.drivers.followed import how_many
from siftune.methods.gast import maths
from siftune.methods.gast.settings import GASTSettings

EPS = 1e-5  # of the largest score, in the z-scores' denominator


def float64(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def uniform(count, source=0):
    """Uniform numbers from a generator, or from the seed of one."""
    source = torch.Generator().manual_seed(source) if isinstance(source, int) else source
    return torch.rand(count, generator=source, dtype=torch.float64)


def all_live(scores):
    return torch.ones_like(scores, dtype=torch.bool)


@st.composite
def scores_and_live(draw):
    """Scores, equal or visibly different, and which samples have a gradient: at least one."""
    numbers = draw(st.lists(st.integers(-999, 999), min_size=1, max_size=9))
    live = draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)).filter(any))
    return float64(numbers) / 7, torch.tensor(live)


@pytest.mark.parametrize("select", [1, 8, 10**6, 1.0, 0.5, 1e-9])
def test_a_count_is_an_int_and_a_share_a_float(select):
    assert GASTSettings(select=select).select == select


@pytest.mark.parametrize("select", [0, -1, True, False, 0.0, -0.5, 1.5, 8.0, math.nan, math.inf, "0.5", None])
def test_other_selects_are_refused(select):
    with pytest.raises(RecipeError, match=rf"gast.select is {select!r}, but must be "):
        GASTSettings(select=select)


_NAMES = {
    "support": ("sample", "rest", "momentum", "dataset"),
    "choice": ("stochastic", "topk", "random"),
    "score": ("inner", "cosine", "preconditioned"),
    "among": ("batch", "recent"),
}


@pytest.mark.parametrize("name", _NAMES)
def test_names(name):
    for value in _NAMES[name]:
        assert getattr(GASTSettings(**{name: value}), name) == value
    for value in ("other", "", None, _NAMES[name][0].upper()):
        with pytest.raises(RecipeError, match=rf"{name} is {value!r}, but must be one of {', '.join(_NAMES[name])}"):
            GASTSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "good", "bad", "advice"),
    [
        ("support_size", [1, 4, 1000], [0, -3], "1 or more"),
        ("support_size", [], [2.5, 2.0, True, math.nan], "a whole number"),
        ("decay", [0, 0.0, 0.5, 0.999], [1, 1.0, -0.1], "from 0 to below 1"),
        ("decay", [], [math.nan, math.inf], "a finite number"),
        ("select_until", [0.1, 1, 1.0], [0, -0.5, 1.5], "above 0 and at most 1"),
    ],
)
def test_ranges(name, good, bad, advice):
    for value in good:
        assert getattr(GASTSettings(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(RecipeError, match=rf"gast.{name} is {value}, but must be {advice}"):
            GASTSettings(**{name: value})


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"support_every": 2, "support": "rest"}, "gast.support_every and gast.support_decay go with support sample"),
        ({"support_decay": 0.5, "support": "momentum"}, "gast.support_every and gast.support_decay go with"),
        ({"among": "recent", "select": 8}, "give gast.select as a share such as 0.5, not as 8 rows of a batch"),
        ({"among": "recent", "support": "rest"}, "gast.among recent looks at one row at a time"),
    ],
)
def test_what_goes_together(settings, advice):
    with pytest.raises(RecipeError, match=advice):
        GASTSettings(**settings)


def test_the_defaults_are_the_papers_but_for_the_share_of_rows():
    expected = (0.75, "sample", 4, 1, 0.0, "stochastic", "inner", 0.9, 1.0, "batch")
    assert dataclasses.astuple(GASTSettings()) == expected


@pytest.mark.parametrize("support", _NAMES["support"])
@pytest.mark.parametrize("choice", _NAMES["choice"])
def test_what_a_choice_needs(choice, support):
    settings = GASTSettings(choice=choice, support=support)
    assert settings.needs_scores == (choice != "random")
    assert settings.needs_rows == (choice != "random" and support in ("sample", "dataset"))


@pytest.mark.parametrize(
    ("select", "samples", "count"),
    [
        (1, 1, 1), (3, 1, 1), (1, 8, 1), (3, 8, 3), (8, 8, 8), (9, 8, 8),
        (0.5, 1, 1), (0.5, 2, 1), (0.5, 3, 1), (0.5, 16, 8), (0.01, 16, 1), (0.99, 16, 15), (1.0, 16, 16), (1.0, 1, 1),
        (0.29, 100, 29), (0.3, 10, 3), (0.7, 10, 7), (1 / 3, 9, 3), (2 / 3, 3, 2),
    ],
)  # fmt: skip
def test_how_many(select, samples, count):
    assert how_many(select, samples) == count


@given(part=st.integers(1, 64), rest=st.integers(0, 64))
def test_a_share_that_comes_out_even_is_not_rounded_down(part, rest):
    assert how_many(part / (part + rest), part + rest) == part


@given(rows=st.integers(1, 5), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_cosines(rows, width, seed):
    left, right = uniform(2 * rows * width, seed).sub(0.5).view(2, rows, width)
    squares = left.square().sum(1)
    for others in (right, right[:1].expand(rows, -1)):
        products, lengths = (left * others).sum(1), others.square().sum(1)
        expected = [p / (math.hypot(*a) * math.hypot(*b)) for p, a, b in zip(products, left, others, strict=True)]
        assert_close(maths.cosines(products, squares, lengths), float64(expected), rtol=1e-12, atol=1e-12)
    assert_close(maths.cosines(products, squares, lengths[0]), float64(expected), rtol=1e-12, atol=1e-12)


def test_cosine_with_nothing_is_zero():
    ones = torch.ones(3)
    assert maths.cosines(ones, torch.zeros(3), torch.ones(())).tolist() == [0.0] * 3
    assert maths.cosines(ones, ones, float64([-1e-9, 0.0, 4.0])).tolist() == [0.0, 0.0, 0.5]  # rounded below 0
    assert maths.cosines(ones, -ones, torch.ones(())).tolist() == [0.0] * 3


def oracle_zscores(scores, live):
    """numpy's standard deviation of the population, over the samples that count."""
    numbers, kept = scores.numpy(), live.numpy()
    largest = np.abs(numbers[kept]).max()
    z = (numbers - numbers[kept].mean()) / (numbers[kept].std(ddof=0) + EPS * largest) if largest else 0 * numbers
    return float64(np.where(kept, z, 0.0).tolist())


@given(scores_and_live(), st.sampled_from([1e-60, 1e-12, 1.0, 1e12, 1e60]))
def test_zscores_at_any_scale(given_scores, scale):
    scores, live = given_scores
    assert_close(maths.zscores(scores * scale, live), oracle_zscores(scores, live), rtol=1e-9, atol=1e-9)


@given(number=st.floats(-1e6, 1e6), count=st.integers(1, 9))
def test_equal_scores_have_zscores_of_zero(number, count):
    equal = torch.full((count,), number, dtype=torch.float64)
    assert maths.zscores(equal, all_live(equal)).abs().max() < 1e-9
    rounded = equal * (1 + 1e-9 * torch.arange(count))
    assert maths.zscores(rounded, all_live(equal)).abs().max() < 1e-3


@given(scores_and_live(), st.sampled_from([0.0, 1e9, -1e9, math.inf, -math.inf, math.nan]))
def test_scores_without_a_gradient_do_not_matter(given_scores, other):
    scores, live = given_scores
    got = maths.zscores(scores.where(live, other), live)
    assert torch.equal(got, maths.zscores(scores, live))
    assert (got[~live] == 0).all()


def test_no_sample_with_a_gradient():
    none = torch.zeros(3, dtype=torch.bool)
    assert torch.equal(maths.zscores(float64([1.0, 2.0, 3.0]), none), torch.zeros(3, dtype=torch.float64))
    assert_close(maths.log_probabilities(torch.zeros(3), none).exp(), torch.full((3,), 1 / 3))


@given(scores_and_live(), st.floats(0.05, 20))
def test_chances_are_the_softmax_over_those_with_a_gradient(given_scores, spread):
    scores, live = given_scores
    z = maths.zscores(scores, live) * spread
    log_p = maths.log_probabilities(z, live)
    weights = [math.exp(float(v)) if kept else 0.0 for v, kept in zip(z, live, strict=True)]
    expected = [weight / sum(weights) for weight in weights]
    assert_close(log_p.exp(), float64(expected), rtol=1e-9, atol=1e-12)
    assert (log_p[~live] < log_p[live].min() - 1e6).all()


def chances_of(weights, count):
    """Exact chance of every outcome, by summing over the orders in which it can be drawn one after the other."""
    chances = {}
    for order in itertools.permutations([i for i, w in enumerate(weights) if w > 0], count):
        left, chance = sum(weights), 1.0
        for sample in order:
            chance *= weights[sample] / left
            left -= weights[sample]
        key = tuple(sorted(order))
        chances[key] = chances.get(key, 0.0) + chance
    assert sum(chances.values()) == pytest.approx(1)
    return chances


def assert_follows(draw, chances, draws=5000):
    """Chi-square test at 0.999; its quantile after Wilson and Hilferty."""
    source = torch.Generator().manual_seed(0)
    counts = dict.fromkeys(chances, 0)
    for _ in range(draws):
        counts[tuple(draw(source).tolist())] += 1  # a KeyError is an outcome that must not be
    found = sum((counts[k] - draws * p) ** 2 / (draws * p) for k, p in chances.items())
    spread = 2 / 9 / (len(chances) - 1)
    assert found < (len(chances) - 1) * (1 - spread + 3.09 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("choice", ["stochastic", "random"])
def test_choices_follow_the_softmax_of_the_zscores(choice, count):
    scores, live = torch.tensor([0.3, -1.0, 9.0, 0.1, 1.2]), torch.tensor([True, True, False, True, True])
    settings = GASTSettings(choice=choice)
    z = oracle_zscores(scores.double(), live)
    even = [float(kept) for kept in live]
    weights = even if choice == "random" else [w * math.exp(v) for w, v in zip(even, z.tolist(), strict=True)]
    chances = chances_of(weights, count)
    assert_follows(lambda source: maths.choose(scores, live, uniform(5, source), count, settings), chances)


@pytest.mark.parametrize("settings", [{}, {"choice": "topk"}, {"choice": "random"}])
@given(given_scores=scores_and_live(), data=st.data(), seed=st.integers(0, 999))
def test_a_choice_is_of_different_samples_and_first_of_those_with_a_gradient(settings, given_scores, data, seed):
    scores, live = given_scores
    count = data.draw(st.integers(1, len(scores)))
    chosen = maths.choose(scores, live, uniform(len(scores), seed), count, GASTSettings(**settings))
    assert chosen.dtype == torch.int64
    assert sorted(set(chosen.tolist())) == chosen.tolist()
    assert len(chosen) == count
    assert int(live[chosen].sum()) == min(count, int(live.sum()))


def test_a_uniform_number_of_zero_is_the_least_likely_and_not_an_error():
    equal, edge = torch.ones(4, dtype=torch.float64), float64([0.5, 0.0, 0.5, 0.5])
    assert maths.choose(equal, all_live(equal), edge, 3, GASTSettings()).tolist() == [0, 2, 3]
    live = torch.tensor([True, False, False, False])  # and yet before those without a gradient
    assert maths.choose(equal, live, float64([0.0, 0.9, 0.9, 0.9]), 1, GASTSettings()).tolist() == [0]


@given(scores=st.lists(st.integers(-99, 99), min_size=1, max_size=9, unique=True), data=st.data())
def test_topk_takes_the_highest(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    live = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    ranked = sorted((i for i in range(len(scores)) if live[i]), key=lambda i: -scores[i])
    chosen = maths.choose(float64(scores), live, uniform(len(scores)), count, GASTSettings(choice="topk")).tolist()
    assert [i for i in chosen if live[i]] == sorted(ranked[:count])


@pytest.mark.parametrize("settings", [GASTSettings(), GASTSettings(choice="random")])
def test_uniform_numbers_decide_alone_at_any_scale_of_the_scores(settings):
    scores, before = torch.linspace(-1, 1, 12), torch.get_rng_state()
    first, *others = (
        [maths.choose(scores * scale, all_live(scores), uniform(12, seed), 4, settings).tolist() for seed in range(9)]
        for scale in (1.0, 1.0, 2.0**-120, 2.0**120)
    )
    assert all(other == first for other in others)
    assert len({tuple(chosen) for chosen in first}) > 1
    assert torch.equal(torch.get_rng_state(), before)


@given(scores_and_live(), st.data())
def test_factor(given_scores, data):
    live = given_scores[1]
    chosen = data.draw(st.lists(st.integers(0, len(live) - 1), min_size=1, unique=True))
    kept = sum(bool(live[i]) for i in chosen)
    got = maths.factor(live, torch.tensor(chosen))
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(int(live.sum()) / max(kept, 1))
