"""Channel scores and fitted columns against dense changes and constrained least squares, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.curvature import curvature, moments
from torch.testing import assert_close

from siftune.base.errors import ModelError
from siftune.offsite.maths.channels import channel_scores, costs_of_counts, keep_channels, refit, refit_scores


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(seed, count, inputs, channels, gated=True):
    """(weight, inputs, output gradients) of the matrices that read, and of the one that writes."""
    x_NI = drawn(seed, count, inputs)
    reads = [(drawn(seed + n, channels, inputs), x_NI, drawn(seed + 3 + n, count, channels)) for n in range(1 + gated)]
    return reads, (drawn(seed + 7, inputs, channels), drawn(seed + 8, count, channels), drawn(seed + 9, count, inputs))


def scores(reads, writes, lam):
    known = [(weight, curvature(x, g)) for weight, x, g in (*reads, writes)]
    return channel_scores(known[:-1], known[-1], lam)


def terms(reads, writes):
    """‖H δ‖₁ and ⟨D, δ⟩ for the loss of every channel: H by Kronecker product, D token by token, δ by zeroing."""
    shifts, rises = [], []
    for channel in range(writes[0].shape[1]):
        shift = rise = 0.0
        for weight, x, g in (*reads, writes):
            less = weight.clone()
            if weight is writes[0]:
                less[:, channel] = 0
            else:
                less[channel] = 0
            delta = (less - weight).flatten()
            hessian = torch.kron(g.T @ g / len(g), x.T @ x / len(x))
            slope = sum(torch.outer(one_g, one_x) for one_g, one_x in zip(g, x, strict=True))
            shift += (hessian @ delta).abs().sum().item()
            rise += (slope.flatten() @ delta).item()
        shifts.append(shift)
        rises.append(rise)
    return shifts, rises


@given(
    shape=st.tuples(st.integers(0, 999), st.integers(1, 7), st.integers(1, 4), st.integers(1, 5)),
    gated=st.booleans(),
    lam=st.sampled_from([0.0, 0.3, 4.0]),
)
def test_scores_of_every_channel(shape, gated, lam):
    reads, writes = mlp(*shape, gated=gated)
    shifts, rises = terms(reads, writes)
    mean_shift, mean_rise = (sum(map(abs, term)) / len(term) for term in (shifts, rises))
    expected = [s / mean_shift - lam * r / mean_rise for s, r in zip(shifts, rises, strict=True)]
    assert_close(scores(reads, writes, lam), torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-8)


def test_half_precision_weights_are_scored_in_float32():
    reads, writes = mlp(0, 9, 4, 6)
    halved = [(weight.bfloat16(), x.bfloat16(), g.bfloat16()) for weight, x, g in (*reads, writes)]
    got = scores(halved[:-1], halved[-1], 0.4)
    assert got.dtype == torch.float32
    *reads, writes = [(w.double(), x.double(), g.double()) for w, x, g in halved]
    assert_close(got.double(), scores(reads, writes, 0.4), rtol=1e-4, atol=1e-4)


@given(numbers=st.lists(st.integers(-5, 5), min_size=1, max_size=9), data=st.data())
def test_kept_channels_ascend(numbers, data):
    count = data.draw(st.integers(0, len(numbers)))
    kept = keep_channels(torch.tensor(numbers).float(), count)
    assert kept.dtype == torch.int64
    assert kept.tolist() == sorted(sorted(range(len(numbers)), key=lambda j: -numbers[j])[:count])


shapes = st.tuples(st.integers(0, 999), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))


def case(seed, count, outputs, channels):
    """A write matrix, its inputs and the gradients of its outputs."""
    return drawn(seed, outputs, channels), drawn(seed + 1, count, channels), drawn(seed + 2, count, outputs)


def refit_costs(weight, x, g, lam, damping=0.1):
    return refit_scores(weight, curvature(x, g), lam, damping)


def damped(x, damping):
    """A_δ, summed over tokens."""
    matrix = sum(torch.outer(row, row) for row in x) / len(x)
    return matrix + damping * middling(x) * torch.eye(len(matrix), dtype=matrix.dtype)


def middling(x):
    """The lower median of the channels' mean squares, of those that are not zero."""
    sizes = sorted(size for size in x.square().mean(0).tolist() if size > 0)
    return sizes[(len(sizes) - 1) // 2]


def least_change(weight, matrix, channel):
    """The change that takes a channel away and is least in the metric of `matrix`: normal equations of the others."""
    others = [j for j in range(len(matrix)) if j != channel]
    delta = torch.zeros_like(weight)
    delta[:, channel] = -weight[:, channel]
    rest = torch.linalg.lstsq(matrix[others][:, others], -matrix[others][:, [channel]] @ delta[:, [channel]].T)
    delta[:, others] = rest.solution.T
    return delta


@given(shape=shapes, lam=st.sampled_from([0.0, 0.3, 4.0]), damping=st.sampled_from([0.01, 0.1]))
def test_costs_of_every_channel(shape, lam, damping):
    """⟨δ, H δ⟩ by Kronecker product and ⟨D, δ⟩ token by token."""
    weight, x, g = case(*shape)
    matrix = damped(x, damping)
    hessian = torch.kron(g.T @ g / len(g), matrix)
    changes = [least_change(weight, matrix, channel) for channel in range(weight.shape[1])]
    costs = [(d.flatten() @ hessian @ d.flatten()).item() for d in changes]
    rises = [sum((g_n @ d @ x_n).item() for g_n, x_n in zip(g, x, strict=True)) for d in changes]
    mean_cost, mean_rise = (sum(map(abs, term)) / len(term) for term in (costs, rises))
    expected = [c / mean_cost - lam * r / mean_rise for c, r in zip(costs, rises, strict=True)]
    assert_close(
        refit_costs(weight, x, g, lam, damping), torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-7
    )


def test_no_other_change_that_takes_a_channel_away_costs_less():
    weight, x, g = case(3, 20, 4, 6)
    matrix = damped(x, 0.1)
    hessian = torch.kron(g.T @ g / len(g), matrix)
    costs = []
    for channel in range(6):
        delta = least_change(weight, matrix, channel)
        costs.append(delta.flatten() @ hessian @ delta.flatten())
        for seed in range(50):
            other = delta + 0.1 * drawn(seed, *delta.shape)
            other[:, channel] = delta[:, channel]
            assert other.flatten() @ hessian @ other.flatten() > costs[-1]
    assert refit_costs(weight, x, g, 0.0).argsort().tolist() == torch.stack(costs).argsort().tolist()


@given(shape=shapes, damping=st.sampled_from([1e-3, 0.1, 2.0]), data=st.data())
def test_fitted_columns_are_the_ridge_solution(shape, damping, data):
    """Against a least squares problem with the penalty as further rows."""
    weight, x, _ = case(*shape)
    channels = weight.shape[1]
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, channels - 1), min_size=1))))
    root = (damping * middling(x)) ** 0.5
    left = torch.cat([x[:, kept] / len(x) ** 0.5, root * torch.eye(channels, dtype=x.dtype)[:, kept]])
    right = torch.cat([x @ weight.T / len(x) ** 0.5, root * weight.T])
    expected = torch.linalg.lstsq(left, right).solution.T
    assert_close(refit(weight, moments(x), kept, damping), expected, rtol=1e-8, atol=1e-8)


@given(
    shape=st.tuples(st.integers(0, 999), st.integers(1, 9), st.integers(1, 4), st.integers(1, 12)),
    damping=st.sampled_from([None, 0.01, 0.1, 3.0]),
    more=st.integers(0, 3),
    data=st.data(),
)
def test_costs_of_several_counts_are_those_of_separate_fits(shape, damping, more, data):
    """Far fewer, fewer and more tokens than channels; ties; counts in any order, and twice."""
    seed, count, inputs, channels = shape
    _, (d, x, g) = mlp(seed, 2 * count + more, inputs, channels)
    known, other = moments(x[:count]), curvature(x[count:], g[count:])
    ranks = data.draw(st.lists(st.integers(0, 3), min_size=channels, max_size=channels))
    counts = data.draw(st.lists(st.integers(1, channels), min_size=1, max_size=6))
    found = costs_of_counts(
        d, other, torch.tensor(ranks), counts, None if damping is None else known, 0.1 if damping is None else damping
    )
    for kept_count, cost in zip(counts, found, strict=True):
        kept = keep_channels(torch.tensor(ranks), kept_count)
        change = -d
        change[:, kept] += d[:, kept] if damping is None else refit(d, known, kept, damping)
        wrote = x[count:] @ change.T
        gradients = g[count:].T @ g[count:] / (count + more)
        assert cost == pytest.approx((wrote @ gradients * wrote).sum().item() / (count + more), rel=1e-6, abs=1e-9)


def test_a_channel_that_another_repeats_costs_nothing_and_is_taken_over():
    weight, x, g = case(1, 30, 4, 6)
    x[:, 5] = 2 * x[:, 1]
    found = refit_costs(weight, x, g, 0.0, 1e-9)
    assert max(found[1], found[5]) < 1e-6 < 0.1 < found[[0, 2, 3, 4]].min()
    kept = torch.arange(5)
    assert_close(x[:, kept] @ refit(weight, moments(x), kept, 1e-12).T, x @ weight.T, rtol=1e-6, atol=1e-6)


def test_everything_kept_is_left_as_it_was():
    weight, x, _ = case(0, 9, 4, 6)
    assert torch.equal(refit(weight, moments(x), torch.arange(6)), weight)


def test_a_channel_that_is_far_larger_than_all_others_does_not_drown_the_fit():
    """By the mean of the diagonal, the damping would be that one channel's, and the others would stay as they were."""
    weight, x, g = case(5, 60, 4, 8)
    x[:, 7] = x[:, 2] + 0.01 * x[:, 7]  # what 7 writes, 2 can write
    kept = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    x[:, 0] *= 1000.0
    left = (x @ weight.T - x[:, kept] @ refit(weight, moments(x), kept, 0.01).T).square().sum()
    untouched = (x[:, 7:] @ weight[:, 7:].T).square().sum()
    assert left < 1e-2 * untouched
    found = refit_costs(weight, x, g, 0.0, 0.01)
    assert set(found.argsort()[:2].tolist()) == {2, 7}  # either can go: the other takes over


def test_rounding_that_exceeds_the_damping_raises_it():
    """Sums in float32 beside a channel that fires with all others at once leave a matrix that is not definite."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 200, generator=generator) * 1e-3
    x[::40] += 300.0 * torch.rand(200, generator=generator)
    weight, kept, seen = torch.randn(5, 200, generator=generator), torch.arange(140), moments(x)
    matrix = seen.dense().double()
    small = 1e-6 * matrix.diagonal().median() * torch.eye(200, dtype=torch.float64)
    assert torch.linalg.cholesky_ex(matrix + small).info > 0  # else there is nothing to raise
    found = refit_costs(weight, x, torch.randn(400, 5, generator=generator), 0.0, 1e-9)
    assert found.isfinite().all()
    fitted = refit(weight, seen, kept, 1e-9)
    assert (x @ weight.T - x[:, kept] @ fitted.T).norm() < 0.1 * (x[:, 140:] @ weight[:, 140:].T).norm()


def test_rounding_does_not_drop_a_pair_of_very_large_channels():
    """Two channels that are large on the same tokens, nearly in one ratio: sums in float32 can make them one.

    Both would then cost nothing, and leave together. Both may stay here, where one suffices: that costs a little.
    """
    worst = 0.0
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        x = 0.15 * torch.randn(1500, 48, generator=generator)
        g, weight = (torch.randn(*size, generator=generator) for size in ((1500, 8), (8, 48)))
        for channel, size in ((0, 3000.0), (1, 1000.0)):
            x[::32, channel] = size * (1 + 1e-4 * torch.randn(47, generator=generator))
        exact = curvature(x.double(), g.double())
        costs = []
        for seen, write in ((curvature(x, g), weight), (exact, weight.double())):
            scores = refit_scores(write, seen, 0.0)
            kept = keep_channels(scores, 40)
            change = -weight.double()
            change[:, kept] += refit(write, seen.inputs, kept)
            costs.append(float((x.double() @ change.T @ (change @ x.double().T)).trace()))
            costs += costs_of_counts(write, exact, scores, [40], seen.inputs)
        worst = max(worst, costs[0] / costs[2], costs[1] / costs[3])
    assert worst < 1.5


def test_channels_that_never_move_have_no_part_in_the_damping():
    weight, x, _ = case(6, 30, 4, 4)
    wide = torch.cat([x, torch.zeros(30, 9, dtype=x.dtype)], dim=1)
    more = torch.cat([weight, torch.ones(4, 9, dtype=x.dtype)], dim=1)
    kept = torch.tensor([0, 2, 3])
    assert_close(refit(more, moments(wide), kept), refit(weight, moments(x), kept))


def test_without_inputs_nothing_is_fitted():
    weight, x, g = case(0, 9, 4, 6)
    assert torch.equal(refit(weight, moments(0 * x), torch.tensor([1, 4])), weight[:, [1, 4]])
    assert torch.equal(refit_costs(weight, 0 * x, g, 0.4), torch.zeros(6, dtype=torch.float64))


def test_half_precision_is_computed_in_float32():
    weight, x, g = (tensor.bfloat16() for tensor in case(0, 9, 4, 6))
    kept = torch.tensor([1, 4])
    found, fitted = refit_costs(weight, x, g, 0.4), refit(weight, moments(x), kept)
    assert found.dtype == fitted.dtype == torch.float32
    weight, x, g = weight.double(), x.double(), g.double()
    assert_close(found.double(), refit_costs(weight, x, g, 0.4), rtol=1e-4, atol=1e-4)
    assert_close(fitted.double(), refit(weight, moments(x), kept), rtol=1e-5, atol=1e-5)


def test_activations_that_are_not_finite_are_refused():
    """No damping mends them: a search for one would never end."""
    inputs = moments(torch.ones(4, 3))
    inputs.values[0, 1] = torch.inf
    with pytest.raises(ModelError, match="not finite"):
        refit(torch.ones(2, 3), inputs, torch.tensor([0, 1]))
