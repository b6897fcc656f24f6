"""Clipping and noise, against loops over rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftune.methods.dp.maths import clip_factors, clipped_sum, noised_means
from siftune.methods.dp.secret import Secret


def gradients(rows, shapes, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(rows, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


@given(
    rows=st.integers(1, 6),
    shapes=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3),
    threshold=st.floats(0.01, 10),
    seed=st.integers(0, 99),
)
def test_it_is_the_loop_over_rows(rows, shapes, threshold, seed):
    parts = gradients(rows, shapes, seed)
    factors = clip_factors(parts, threshold)
    wanted = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    for row in range(rows):
        norm = math.sqrt(sum(float(part[row].square().sum()) for part in parts))
        for total, part in zip(wanted, parts, strict=True):
            total += part[row] if norm <= threshold else part[row] * threshold / norm
    for part, total in zip(parts, wanted, strict=True):
        torch.testing.assert_close(clipped_sum(part, factors), total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_a_row_that_is_not_finite_counts_nothing(broken):
    [part, other] = gradients(3, [(2, 2), (3,)], 0)
    part[1, 0, 1] = broken
    factors = clip_factors([part, other], 1e3)
    assert factors.tolist() == [1, 0, 1]
    assert torch.equal(clipped_sum(part, factors), part[0] + part[2])
    assert torch.equal(clipped_sum(other, factors), other[0] + other[2])


def test_a_row_without_gradient_adds_nothing():
    part = torch.zeros(2, 3)
    factors = clip_factors([part], 0.5)
    assert factors.tolist() == [1, 1]
    assert clipped_sum(part, factors).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e16])
def test_in_float32_only_rounding_exceeds_the_norm(dtype, scale):
    parts = [part.to(dtype) for part in gradients(1, [(300, 200), (7,)], 0, scale)]
    factors = clip_factors(parts, 0.1 * scale)
    sums = [clipped_sum(part, factors).double().flatten() for part in parts]
    assert float(torch.cat(sums).norm()) == pytest.approx(0.1 * scale, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_summed_in_float32(dtype):
    part = torch.full((1000, 2), 1 / 512).to(dtype)
    total = clipped_sum(part, clip_factors([part], 1.0))
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, torch.full((2,), 1000 / 512))


def test_the_noise_has_the_stated_scale():
    total = torch.full((200_000,), 3.0)
    drawn = noised_means([total], 0.7, 4.0, Secret(0).stream("noise", 0))[0]
    assert float(drawn.mean()) == pytest.approx(3 / 4, abs=4 * 0.7 / 4 / math.sqrt(200_000))
    assert float(drawn.std()) == pytest.approx(0.7 / 4, rel=0.01)
    assert float((drawn - 3 / 4).abs().gt(2 * 0.7 / 4).float().mean()) == pytest.approx(0.0455, abs=0.002)
    assert torch.equal(total, torch.full((200_000,), 3.0)), "the sum itself was changed"


def test_noise_is_added_before_the_sum_is_rounded():
    """Else few sums are possible after the same noise, and they tell which it was (Mironov 2012)."""
    total = torch.linspace(-1e3, 1e3, 1000)
    noise = Secret(0).stream("noise", 0).normal(1000)
    drawn = noised_means([total], 0.7, 3.0, Secret(0).stream("noise", 0))[0]
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, ((total.double() + 0.7 * noise) / 3).float())
    assert not torch.equal(drawn, (total + 0.7 * noise.float()) / 3)
