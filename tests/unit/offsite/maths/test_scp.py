"""Channel scores against dense changes of every matrix, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from siftune.offsite.maths.channels import channel_scores, keep_channels
from siftune.offsite.maths.kfac import curvature


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


@pytest.mark.parametrize("count", [3, 30], ids=["rows", "matrix"])
def test_what_does_not_matter_to_scores(count):
    reads, writes = mlp(0, count, 4, 6)
    order = torch.cat([batch.flip(0) for batch in reversed(torch.arange(count).split(2))])

    def changed(change_x, change_g):
        *others, last = [(weight, change_x(x), change_g(g)) for weight, x, g in (*reads, writes)]
        return scores(others, last, 0.4)

    expected = scores(reads, writes, 0.4)
    assert_close(changed(lambda x: x[order], lambda g: g[order]), expected)  # other batches
    assert_close(changed(lambda x: x, lambda g: g / count), expected)  # the mean loss
    assert_close(changed(*2 * (lambda rows: torch.cat([rows, 0 * rows[:2]]),)), expected)  # empty rows


def test_limits_of_lambda():
    reads, writes = mlp(0, 9, 4, 6)
    shifts, rises = terms(reads, writes)
    assert scores(reads, writes, 0.0).argsort(descending=True).tolist() == sorted(range(6), key=lambda j: -shifts[j])
    assert scores(reads, writes, 1e9).argsort(descending=True).tolist() == sorted(range(6), key=lambda j: rises[j])


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
