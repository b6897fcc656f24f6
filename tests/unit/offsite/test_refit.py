"""Channels that others take over: costs and fitted columns against constrained least squares, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_scp import drawn, mlp
from torch.testing import assert_close

from siftune.offsite.kfac import curvature, moments
from siftune.offsite.refit import refit, refit_scores

shapes = st.tuples(st.integers(0, 999), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5))


def scores(reads, writes, lam, damping):
    known = [(weight, curvature(x, g)) for weight, x, g in (*reads, writes)]
    return refit_scores(known[:-1], known[-1], lam, damping)


def damped(x, damping):
    """A_δ, summed over tokens."""
    matrix = sum(torch.outer(row, row) for row in x) / len(x)
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def least_change(weight, matrix, channel):
    """The change of `weight` whose column `channel` undoes that of the weight, least in the metric of `matrix`: the
    other columns solve the normal equations."""
    others = [j for j in range(len(matrix)) if j != channel]
    delta = torch.zeros_like(weight)
    delta[:, channel] = -weight[:, channel]
    rest = torch.linalg.lstsq(matrix[others][:, others], -matrix[others][:, [channel]] @ delta[:, [channel]].T)
    delta[:, others] = rest.solution.T
    return delta


def terms(reads, writes, damping):
    """⟨δ, H δ⟩ by Kronecker product and ⟨D, δ⟩ token by token, for every channel."""
    costs, rises = [], []
    for channel in range(writes[0].shape[1]):
        cost = rise = 0.0
        for weight, x, g in (*reads, writes):
            matrix = damped(x, damping if weight is writes[0] else 0.0)
            if weight is writes[0]:
                delta = least_change(weight, matrix, channel)
            else:
                delta = torch.zeros_like(weight)
                delta[channel] = -weight[channel]
            flat = delta.flatten()
            cost += (flat @ torch.kron(g.T @ g / len(g), matrix) @ flat).item()
            rise += sum((g_n @ delta @ x_n).item() for g_n, x_n in zip(g, x, strict=True))
        costs.append(cost)
        rises.append(rise)
    return costs, rises


@given(shape=shapes, gated=st.booleans(), lam=st.sampled_from([0.0, 0.3, 4.0]), damping=st.sampled_from([0.01, 0.1]))
def test_scores_of_every_channel(shape, gated, lam, damping):
    reads, writes = mlp(*shape, gated=gated)
    costs, rises = terms(reads, writes, damping)
    mean_cost, mean_rise = (sum(map(abs, term)) / len(term) for term in (costs, rises))
    expected = [c / mean_cost - lam * r / mean_rise for c, r in zip(costs, rises, strict=True)]
    got = scores(reads, writes, lam, damping)
    assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-7)


def test_no_other_change_that_drops_a_channel_costs_less():
    _, (weight, x, g) = mlp(3, 20, 4, 6)
    matrix = damped(x, 0.1)
    hessian = torch.kron(g.T @ g / len(g), matrix)
    for channel in range(6):
        delta = least_change(weight, matrix, channel)
        least = delta.flatten() @ hessian @ delta.flatten()
        for seed in range(50):
            other = delta + 0.1 * drawn(seed, *delta.shape)
            other[:, channel] = delta[:, channel]
            assert other.flatten() @ hessian @ other.flatten() > least


@given(shape=shapes, damping=st.sampled_from([1e-3, 0.1, 2.0]), data=st.data())
def test_fitted_columns_are_the_ridge_solution(shape, damping, data):
    """Against a least squares problem with the penalty as further rows."""
    _, (weight, x, _) = mlp(*shape)
    channels = weight.shape[1]
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, channels - 1), min_size=1))))
    root = (damping * x.square().mean(0).mean()).sqrt()  # mean over channels of A's diagonal
    left = torch.cat([x[:, kept] / len(x) ** 0.5, root * torch.eye(channels, dtype=x.dtype)[:, kept]])
    right = torch.cat([x @ weight.T / len(x) ** 0.5, root * weight.T])
    expected = torch.linalg.lstsq(left, right).solution.T
    assert_close(refit(weight, moments(x), kept, damping), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("count", [3, 30], ids=["rows", "matrix"])
def test_a_channel_that_others_repeat_costs_nothing_and_is_taken_over(count):
    reads, (weight, x, g) = mlp(1, count, 4, 6)
    x[:, 5] = 2 * x[:, 1]
    kept = torch.arange(5)
    assert_close(x[:, kept] @ refit(weight, moments(x), kept, 1e-12).T, x @ weight.T, rtol=1e-6, atol=1e-6)
    silent = [(0 * w, inputs, grads) for w, inputs, grads in reads]  # what is left is the write matrix's part
    found = scores(silent, (weight, x, g), 0.0, 1e-9)
    if count == 30:  # with fewer rows than channels each can be had from the others
        assert found.argmin() in (1, 5)
        assert found[5] < 1e-6 < found[[0, 2, 3, 4]].min()


@pytest.mark.parametrize("count", [3, 30], ids=["rows", "matrix"])
def test_what_does_not_matter(count):
    reads, writes = mlp(0, count, 4, 6)
    order = torch.cat([batch.flip(0) for batch in reversed(torch.arange(count).split(2))])
    kept = torch.tensor([0, 2, 3])

    def changed(change_x, change_g):
        *others, last = [(weight, change_x(x), change_g(g)) for weight, x, g in (*reads, writes)]
        return torch.cat([scores(others, last, 0.4, 0.1), refit(last[0], moments(last[1]), kept).flatten()])

    def same(rows):
        return rows

    expected = changed(same, same)
    assert_close(changed(lambda x: x[order], lambda g: g[order]), expected)  # other batches
    assert_close(changed(same, lambda g: g / count), expected)  # the mean loss
    assert_close(changed(*2 * (lambda rows: torch.cat([rows, 0 * rows[:2]]),)), expected)  # empty rows


def test_everything_kept_is_left_as_it_was():
    _, (weight, x, _) = mlp(0, 9, 4, 6)
    assert_close(refit(weight, moments(x), torch.arange(6)), weight, rtol=0, atol=0)


def test_without_inputs_nothing_is_fitted():
    reads, (weight, x, g) = mlp(0, 9, 4, 6)
    assert torch.equal(refit(weight, moments(0 * x), torch.tensor([1, 4])), weight[:, [1, 4]])
    reads = [(w, 0 * inputs, grads) for w, inputs, grads in reads]
    assert torch.equal(scores(reads, (weight, 0 * x, g), 0.4, 0.1), torch.zeros(6, dtype=torch.float64))


def test_half_precision_is_computed_in_float32():
    reads, writes = mlp(0, 9, 4, 6)
    halved = [(weight.bfloat16(), x.bfloat16(), g.bfloat16()) for weight, x, g in (*reads, writes)]
    got = scores(halved[:-1], halved[-1], 0.4, 0.1)
    fitted = refit(halved[-1][0], moments(halved[-1][1]), torch.tensor([1, 4]))
    assert got.dtype == fitted.dtype == torch.float32
    *reads, writes = [(w.double(), x.double(), g.double()) for w, x, g in halved]
    assert_close(got.double(), scores(reads, writes, 0.4, 0.1), rtol=1e-4, atol=1e-4)
    expected = refit(writes[0], moments(writes[1]), torch.tensor([1, 4]))
    assert_close(fitted.double(), expected, rtol=1e-5, atol=1e-5)
