"""GAST's scores, chances and draws against plain Python, exact chances and counts."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from siftune.methods.gast import maths
from siftune.methods.gast.maths import live_samples, score_samples
from siftune.methods.options import GASTSettings

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


# scores against double loops over samples and values, in Python floats

shapes = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4)


@st.composite
def cases(draw):
    """Gradients of the samples and a support gradient, of one to four parameters; some samples without."""
    samples, parameters = draw(st.integers(1, 6)), draw(shapes)
    live = torch.tensor(draw(st.lists(st.booleans(), min_size=samples, max_size=samples)))
    source = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    grads = [torch.randn(samples, *shape, generator=source, dtype=torch.float64) for shape in parameters]
    support = [torch.randn(shape, generator=source, dtype=torch.float64) for shape in parameters]
    for grad in grads:
        grad[~live] = 0
    return grads, support, live


def side_by_side(tensors):
    return [value for tensor in tensors for value in tensor.flatten().tolist()]


def oracle(grads, support, cosine=False):
    """⟨h_i, g_i⟩ one sample and one value at a time; h_i is the support's gradient, or the sum of the others'."""
    samples = [side_by_side(g[i] for g in grads) for i in range(len(grads[0]))]
    scores = []
    for i, own in enumerate(samples):
        if support is None:
            other = [0.0] * len(own)
            for j, theirs in enumerate(samples):
                other = [a + b for a, b in zip(other, theirs, strict=True)] if j != i else other
        else:
            other = side_by_side(support)
        product = sum(a * b for a, b in zip(own, other, strict=True))
        length = math.sqrt(sum(a * a for a in own)) * math.sqrt(sum(b * b for b in other))
        scores.append(product if not cosine else product / length if length else 0.0)
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("rest", [False, True], ids=["support", "rest"])
@given(case=cases())
def test_scores_equal_the_double_loop(rest, cosine, case):
    grads, support, live = case
    support = None if rest else support
    got = score_samples(grads, support, cosine)
    if not (rest and cosine and live.sum() <= 1):  # then the support is zero but for rounding, and there is no choice
        assert_close(got.scores, oracle(grads, support, cosine), rtol=1e-10, atol=1e-10)
    assert (got.scores[~live] == 0).all()
    assert torch.equal(got.live, live)


@given(case=cases(), place=st.integers(0, 9))
def test_one_value_is_enough_to_be_live(case, place):
    grads, _, live = case
    single = [torch.zeros_like(g) for g in grads]
    chosen = single[place % len(single)]
    chosen.flatten(1)[:, place % chosen[0].numel()] = live.double() * -1e-3
    for scored in (score_samples(single, None), score_samples(single, [s[0] for s in single])):
        assert torch.equal(scored.live, live)
    assert torch.equal(live_samples(single), live)
    assert torch.equal(live_samples(grads), live)


def test_opposite_values_do_not_cancel():
    grads = [torch.tensor([[1.0, -1.0], [0.0, 0.0]]), torch.tensor([[-1.0], [0.0]])]
    assert live_samples(grads).tolist() == score_samples(grads, None).live.tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rest", [False, True])
def test_scores_are_wide(dtype, rest):
    source = torch.Generator().manual_seed(0)
    grads = [torch.randn(3, 4, 2, generator=source).to(dtype), torch.randn(3, 5, generator=source).to(dtype)]
    support = None if rest else [torch.ones(4, 2), torch.ones(5)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for cosine in (False, True):
        scored = score_samples(grads, support, cosine=cosine)
        assert (scored.scores.dtype, scored.live.dtype) == (wide, torch.bool)
        expected = oracle([g.double() for g in grads], support, cosine)
        assert_close(scored.scores.double(), expected, rtol=1e-4, atol=1e-4)


def test_large_halves_do_not_overflow():
    """Values whose squares are beyond float16."""
    grads = [torch.tensor([[3e4, 1.0], [3e4, -1.0]], dtype=torch.float16)]
    large = float(grads[0][0, 0])
    support = [torch.tensor([3e4, 0.0])]
    assert score_samples(grads, support).scores.tolist() == pytest.approx([large * 3e4] * 2)
    assert score_samples(grads, None).scores.tolist() == pytest.approx([large**2] * 2, rel=1e-6)


def test_the_length_of_a_support_gradient_in_float16():
    """The squares of 1e-5 and of 3e4 are no float16 numbers."""
    grads, support = small_case()
    expected = oracle([g.double() for g in grads], [support[0].double()], True)
    assert_close(score_samples(grads, support, cosine=True).scores.double(), expected, rtol=1e-4, atol=1e-5)
    large = score_samples(grads, [torch.full((8,), 3e4, dtype=torch.float16)], cosine=True).scores
    assert_close(large.double(), oracle([g.double() for g in grads], [torch.ones(8)], True), rtol=1e-4, atol=1e-5)


def small_case():
    source = torch.Generator().manual_seed(0)
    grads, support = torch.randn(4, 8, generator=source) * 1e-3, torch.randn(8, generator=source) * 1e-5
    return [grads.half()], [support.half()]


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_cosine_of_a_row_much_longer_than_the_rest(ratio):
    grads = [torch.randn(4, 20, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    for grad in grads:
        grad[0] *= ratio
    got = score_samples(grads, None, cosine=True).scores
    assert_close(got.double(), oracle([g.double() for g in grads], None, True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("support", [None, "ones", "bad"])
@pytest.mark.parametrize("cosine", [False, True])
def test_what_is_not_finite_shows_in_the_scores(support, cosine):
    grads = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    towards = {None: None, "ones": [torch.ones(2)], "bad": [torch.tensor([1.0, math.nan])]}[support]
    if support != "bad":
        grads[1, 0] = math.nan
    assert not torch.isfinite(score_samples([grads], towards, cosine=cosine).scores).all()
