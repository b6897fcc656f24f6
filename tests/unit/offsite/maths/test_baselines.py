"""Layer drop, FLAP and SVD against plain loops."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from siftune.base.errors import RecipeError
from siftune.offsite.maths.baselines import (
    flap_bias,
    flap_scores,
    svd_factor,
    uniform_layers,
)
from siftune.offsite.maths.drd import canonical


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(count=st.integers(1, 99), data=st.data())
def test_uniform_layers(count, data):
    kept = data.draw(st.integers(0, count))
    got = uniform_layers(count, kept)
    assert len(got) == kept
    assert got == sorted(set(got))
    assert set(got) <= set(range(count))
    if kept >= 2:
        assert (got[0], got[-1]) == (0, count - 1)
        gaps = [after - before for before, after in itertools.pairwise(got)]
        assert max(gaps) - min(gaps) <= 1
    if kept == count:
        assert got == list(range(count))


@pytest.mark.parametrize(
    ("count", "kept", "layers"),
    [(20, 8, [0, 3, 5, 8, 11, 14, 16, 19]), (26, 2, [0, 25]), (26, 1, [13]), (1, 1, [0]), (26, 0, [])],
)
def test_uniform_layers_of_offsite_tuning(count, kept, layers):
    assert uniform_layers(count, kept) == layers


@pytest.mark.parametrize("kept", [-1, 7])
def test_counts_out_of_range(kept):
    with pytest.raises(RecipeError, match=rf"{kept} of 6 middle layers would stay; give a number from 0 to 6\."):
        uniform_layers(6, kept)


@given(seed=st.integers(0, 999), tokens=st.integers(1, 6), channels=st.integers(1, 5), outputs=st.integers(1, 4))
def test_flap(seed, tokens, channels, outputs):
    x_NC, weight_OC = drawn(seed, tokens, channels) + 2, drawn(seed + 1, outputs, channels)
    dropped = [j for j in range(channels) if (seed + j) % 2]
    scores, bias = [], [0.0] * outputs
    for j in range(channels):
        values = x_NC[:, j].tolist()
        mean = sum(values) / tokens
        fluctuation = sum((value - mean) ** 2 for value in values) / max(tokens - 1, 1)
        scores.append(fluctuation * sum(weight**2 for weight in weight_OC[:, j].tolist()))
        if j in dropped:
            bias = [total + mean * weight for total, weight in zip(bias, weight_OC[:, j].tolist(), strict=True)]
    assert_close(flap_scores(x_NC, weight_OC), torch.tensor(scores, dtype=torch.float64))
    got = flap_bias(x_NC, weight_OC, torch.tensor(dropped, dtype=torch.int64))
    assert_close(got, torch.tensor(bias, dtype=torch.float64))


def test_flap_keeps_the_mean_output():
    x_NC, weight_OC, kept, dropped = drawn(0, 9, 5) + 1, drawn(1, 3, 5), [0, 3], torch.tensor([1, 2, 4])
    less = x_NC[:, kept] @ weight_OC[:, kept].T + flap_bias(x_NC, weight_OC, dropped)
    assert_close(less.mean(0), (x_NC @ weight_OC.T).mean(0))


def test_flap_in_half_precision():
    x_NC, weight_OC, dropped = drawn(0, 9, 5).bfloat16(), drawn(1, 3, 5).bfloat16(), torch.tensor([1, 4])
    for half, whole in (
        (flap_scores(x_NC, weight_OC), flap_scores(x_NC.double(), weight_OC.double())),
        (flap_bias(x_NC, weight_OC, dropped), flap_bias(x_NC.double(), weight_OC.double(), dropped)),
    ):
        assert half.dtype == torch.float32
        assert_close(half.double(), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_factor(shape, rank):
    weight_OI = drawn(0, *shape)
    up, down = svd_factor(weight_OI, rank)
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    assert up.dtype == down.dtype == torch.float32
    tail = torch.linalg.svdvals(weight_OI)[rank:].norm()
    assert_close((weight_OI - up.double() @ down.double()).norm(), tail, rtol=1e-5, atol=1e-5)
    for got, expected in zip((up, down), canonical(up.double(), down.double()), strict=True):
        assert_close(got, expected.float())


def test_svd_factor_of_half_precision():
    weight_OI = drawn(0, 4, 6).bfloat16()
    up, down = svd_factor(weight_OI, 4)
    assert_close(up @ down, weight_OI.float())
