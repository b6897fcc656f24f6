"""Noise on curvature: its sensitivity, its scale, and ε against the definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lab.private_moments import clipped, gaussian_delta, gaussian_epsilon, private_moments


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(rows, clip=1.0, noise=0.0, tokens=4, seed=0):
    return private_moments(rows, clip, noise, tokens, torch.Generator().manual_seed(seed)).values


def test_clipping_row_by_row():
    rows = drawn(0, 20, 5) * torch.logspace(-2, 2, 20, dtype=torch.float64)[:, None]
    found = clipped(rows, 1.5)
    for row, one in zip(rows, found, strict=True):
        wanted = row if row.norm() <= 1.5 else row * 1.5 / row.norm()
        torch.testing.assert_close(one, wanted)
    assert torch.equal(clipped(torch.zeros(2, 3), 1.0), torch.zeros(2, 3))


@given(st.integers(0, 50), st.integers(1, 6), st.floats(0.1, 3.0))
def test_a_row_of_tokens_moves_the_sum_by_no_more_than_the_sensitivity(seed, tokens, clip):
    """Neighbours: all tokens of one calibration row are there or not."""
    rest, row = drawn(seed, 9, 4), 100 * drawn(seed + 99, tokens, 4)
    sums = [clipped(rows, clip).T @ clipped(rows, clip) for rows in (rest, torch.cat([rest, row]))]
    assert (sums[1] - sums[0]).norm() <= tokens * clip**2 + 1e-9
    alike = row[:1].expand(tokens, 4)
    sums[1] = clipped(torch.cat([rest, alike]), clip).T @ clipped(torch.cat([rest, alike]), clip)
    assert (sums[1] - sums[0]).norm() == pytest.approx(tokens * clip**2)  # the bound is reached


def test_without_noise_it_is_the_moment_of_clipped_rows():
    rows = drawn(1, 30, 6)
    torch.testing.assert_close(made(rows), clipped(rows, 1.0).T @ clipped(rows, 1.0) / 30)


def test_the_scale_of_the_noise():
    """Far from zero nothing is projected away, and noise can be read off."""
    rows = 100 * torch.eye(12, dtype=torch.float64).repeat(40, 1)
    plain = made(rows, clip=100.0)
    draws = torch.stack([made(rows, 100.0, 0.001, 4, seed) - plain for seed in range(300)]) * len(rows)
    wanted = 0.001 * 4 * 100.0**2
    assert draws.std(0).mean().item() == pytest.approx(wanted, rel=0.03)
    assert draws.diagonal(dim1=1, dim2=2).std().item() == pytest.approx(wanted, rel=0.05)
    assert torch.allclose(draws, draws.transpose(1, 2))
    assert draws.mean().abs() < wanted / 50


def test_what_comes_out_has_no_negative_direction_and_repeats():
    found = made(drawn(2, 5, 8), noise=10.0)
    assert torch.linalg.eigvalsh(found).min() > -1e-9
    assert torch.equal(found, made(drawn(2, 5, 8), noise=10.0))
    assert not torch.allclose(found, made(drawn(2, 5, 8), noise=10.0, seed=1))


@pytest.mark.parametrize(("noise", "releases"), [(1.0, 1), (4.0, 1), (2.0, 9), (30.0, 234)])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
def test_delta_by_the_definition(noise, releases, epsilon):
    """The hockey-stick divergence of k normal draws and their shifted twins, integrated over the log ratio."""
    mu = math.sqrt(releases) / noise
    ratio = np.linspace(-60, 60, 400_001)  # of densities, in logarithms; normal with mean μ²/2 and deviation μ
    density = np.exp(-0.5 * ((ratio - mu**2 / 2) / mu) ** 2) / (mu * math.sqrt(2 * math.pi))
    gain = np.clip(1 - np.exp(epsilon - ratio), 0, None)
    wanted = float((gain * density).sum() * (ratio[1] - ratio[0]))
    assert gaussian_delta(epsilon, noise, releases) == pytest.approx(wanted, abs=1e-6)


@given(st.floats(0.05, 50), st.integers(1, 300))
def test_epsilon_is_the_least_that_delta_allows(noise, releases):
    found = gaussian_epsilon(1e-5, noise, releases)
    assert gaussian_delta(found, noise, releases) <= 1e-5
    if found > 1e-6:
        assert gaussian_delta(found * 0.999 - 1e-9, noise, releases) > 1e-5 or found < 1e-3


def test_more_releases_and_less_noise_cost_more():
    assert gaussian_epsilon(1e-5, 2.0, 4) == pytest.approx(gaussian_epsilon(1e-5, 1.0, 1))
    assert gaussian_epsilon(1e-5, 1.0, 2) > gaussian_epsilon(1e-5, 1.0) > gaussian_epsilon(1e-5, 2.0)
    assert gaussian_epsilon(1e-5, 0.0) == gaussian_epsilon(1e-5, 1e-9) == math.inf
