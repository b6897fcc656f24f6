"""Scores against double loops over samples and values, in Python floats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from siftune.methods.gast.maths import live_samples, score_samples

shapes = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4)


@st.composite
def cases(draw):
    """Gradients of the samples, a support gradient and a metric, of one to four parameters; some samples without."""
    samples, parameters = draw(st.integers(1, 6)), draw(shapes)
    live = torch.tensor(draw(st.lists(st.booleans(), min_size=samples, max_size=samples)))
    source = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    grads = [torch.randn(samples, *shape, generator=source, dtype=torch.float64) for shape in parameters]
    support = [torch.randn(shape, generator=source, dtype=torch.float64) for shape in parameters]
    metric = [0.1 + torch.rand(shape, generator=source, dtype=torch.float64) for shape in parameters]
    for grad in grads:
        grad[~live] = 0
    return grads, support, metric, live


def side_by_side(tensors):
    return [value for tensor in tensors for value in tensor.flatten().tolist()]


def oracle(grads, support, metric, cosine):
    """⟨h_i, g_i⟩ one sample and one value at a time; h_i is the support's gradient, or the sum of the others'."""
    samples = [side_by_side(g[i] for g in grads) for i in range(len(grads[0]))]
    weights = [1.0] * len(samples[0]) if metric is None else side_by_side(metric)
    scores = []
    for i, own in enumerate(samples):
        if support is None:
            other = [0.0] * len(own)
            for j, theirs in enumerate(samples):
                other = [a + b for a, b in zip(other, theirs, strict=True)] if j != i else other
        else:
            other = side_by_side(support)
        product = sum(m * a * b for m, a, b in zip(weights, own, other, strict=True))
        squares = [sum(m * a * a for m, a in zip(weights, side, strict=True)) for side in (own, other)]
        length = math.sqrt(squares[0]) * math.sqrt(squares[1])
        scores.append(product if not cosine else product / length if length else 0.0)
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("rest", [False, True], ids=["support", "rest"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "metric"])
@given(case=cases())
def test_inner_products(rest, weighted, case):
    grads, support, metric, live = case
    got = score_samples(grads, None if rest else support, metric if weighted else None)
    expected = oracle(grads, None if rest else support, metric if weighted else None, False)
    assert_close(got.scores, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(got.live, live)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "metric"])
@given(case=cases())
def test_cosines_with_a_support_gradient(weighted, case):
    grads, support, metric, live = case
    metric = metric if weighted else None
    got = score_samples(grads, support, metric, cosine=True)
    assert_close(got.scores, oracle(grads, support, metric, True), rtol=1e-10, atol=1e-10)
    assert (got.scores[~live] == 0).all()
    assert torch.equal(got.live, live)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "metric"])
@given(case=cases())
def test_cosines_with_the_other_samples(weighted, case):
    grads, _, metric, live = case
    metric = metric if weighted else None
    got = score_samples(grads, None, metric, cosine=True)
    if live.sum() > 1:  # else the support is zero but for rounding, and nothing is to be chosen
        assert_close(got.scores, oracle(grads, None, metric, True), rtol=1e-10, atol=1e-10)
    assert (got.scores[~live] == 0).all()
    assert torch.equal(got.live, live)


@given(case=cases())
def test_a_metric_of_ones_is_none(case):
    grads, support, metric, _ = case
    ones = [torch.ones_like(m) for m in metric]
    for other in (support, None):
        assert_close(score_samples(grads, other, ones), score_samples(grads, other), rtol=1e-12, atol=1e-12)


@given(case=cases(), place=st.integers(0, 9))
def test_one_value_is_enough_to_be_live(case, place):
    grads, *_, live = case
    single = [torch.zeros_like(g) for g in grads]
    chosen = single[place % len(single)]
    chosen.flatten(1)[:, place % chosen[0].numel()] = live.double() * -1e-3
    for scored in (score_samples(single, None), score_samples(single, [s[0] for s in single])):
        assert torch.equal(scored.live, live)
    assert torch.equal(live_samples(single), live)
    assert torch.equal(live_samples(grads), live)


def test_a_sample_may_be_live_in_the_larger_parameter_alone():
    grads = [torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0], [0.0], [0.0]])]
    assert live_samples(grads).tolist() == score_samples(grads, None).live.tolist() == [True, True, False]


def test_opposite_values_do_not_cancel():
    grads = [torch.tensor([[1.0, -1.0], [0.0, 0.0]]), torch.tensor([[-1.0], [0.0]])]
    assert live_samples(grads).tolist() == score_samples(grads, None).live.tolist() == [True, False]


def test_scores_by_hand():
    grads = [torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), torch.tensor([[[0.0]], [[2.0]], [[0.0]]])]
    support = [torch.tensor([1.0, 1.0]), torch.tensor([[-1.0]])]
    metric = [torch.tensor([1.0, 10.0]), torch.tensor([[100.0]])]
    assert score_samples(grads, support).scores.tolist() == [7.0, -1.0, 0.0]
    assert score_samples(grads, support, metric).scores.tolist() == [43.0, -199.0, 0.0]
    assert score_samples(grads, None).scores.tolist() == [3.0, 3.0, 0.0]
    expected = [7 / (5 * math.sqrt(3)), -1 / (math.sqrt(5) * math.sqrt(3)), 0.0]
    assert score_samples(grads, support, cosine=True).scores.tolist() == pytest.approx(expected)


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
        expected = oracle([g.double() for g in grads], support, None, cosine)
        assert_close(scored.scores.double(), expected, rtol=1e-4, atol=1e-4)


def test_large_halves_do_not_overflow():
    """Values whose squares are beyond float16."""
    grads = [torch.tensor([[3e4, 1.0], [3e4, -1.0]], dtype=torch.float16)]
    large = float(grads[0][0, 0])
    support = [torch.tensor([3e4, 0.0])]
    assert score_samples(grads, support).scores.tolist() == pytest.approx([large * 3e4] * 2)
    assert score_samples(grads, None, [torch.ones(2)]).scores.tolist() == pytest.approx([large**2] * 2, rel=1e-6)
    assert score_samples(grads, None).scores.tolist() == pytest.approx([large**2] * 2, rel=1e-6)


@pytest.mark.parametrize("rest", [False, True])
def test_a_metric_beyond_float16(rest):
    """Adam's metric goes up to 1/ε: 1e8, where float16 ends at 65504."""
    grads, support = small_case()
    got = score_samples(grads, None if rest else support, [torch.full((8,), 1e7)])
    expected = score_samples([g.double() for g in grads], None if rest else [h.double() for h in support])
    assert_close(got.scores.double(), 1e7 * expected.scores, rtol=1e-4, atol=0)


def test_the_length_of_a_support_gradient_in_float16():
    """The squares of 1e-5 and of 3e4 are no float16 numbers."""
    grads, support = small_case()
    expected = oracle([g.double() for g in grads], [support[0].double()], None, True)
    assert_close(score_samples(grads, support, cosine=True).scores.double(), expected, rtol=1e-4, atol=1e-5)
    large = score_samples(grads, [torch.full((8,), 3e4, dtype=torch.float16)], cosine=True).scores
    assert_close(large.double(), oracle([g.double() for g in grads], [torch.ones(8)], None, True), rtol=1e-4, atol=1e-5)


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
    assert_close(got.double(), oracle([g.double() for g in grads], None, None, True), rtol=1e-4, atol=1e-5)


def test_gradients_that_are_no_number_are_seen():
    grads = [torch.tensor([[1.0], [math.nan], [2.0]])]
    assert not torch.isfinite(score_samples(grads, None).scores).all()
    assert not torch.isfinite(score_samples(grads, [torch.ones(1)]).scores).all()


@pytest.mark.parametrize("support", [None, "ones", "bad"])
@pytest.mark.parametrize("cosine", [False, True])
def test_what_is_not_finite_shows_in_the_scores(support, cosine):
    grads = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    towards = {None: None, "ones": [torch.ones(2)], "bad": [torch.tensor([1.0, math.nan])]}[support]
    if support != "bad":
        grads[1, 0] = math.nan
    assert not torch.isfinite(score_samples([grads], towards, cosine=cosine).scores).all()
