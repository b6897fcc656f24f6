"""Layer drop, CRaSh, FLAP and SVD against plain loops."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from siftune.base.errors import RecipeError
from siftune.offsite.maths.baselines import (
    crash_sources,
    flap_bias,
    flap_scores,
    linear_cka,
    neighbour_similarities,
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


@pytest.mark.parametrize(("function", "least"), [(lambda n, k: uniform_layers(n, k), 0), (None, 1)])
@pytest.mark.parametrize("off", ["low", "high"])
def test_counts_out_of_range(function, least, off):
    function = function or (lambda n, k: crash_sources(torch.zeros(n - 1), k))
    kept = least - 1 if off == "low" else 7
    with pytest.raises(RecipeError, match=rf"{kept} of 6 middle layers would stay; give a number from {least} to 6\."):
        function(6, kept)


def cka(x_NF, y_NF):
    """By its definition with kernels: HSIC(K, L) / √(HSIC(K, K) HSIC(L, L))."""
    count = len(x_NF)
    centre = torch.eye(count).double() - torch.full((count, count), 1 / count).double()
    k, l = centre @ x_NF @ x_NF.T @ centre, centre @ y_NF @ y_NF.T @ centre  # noqa: E741
    return (k * l).sum() / math.sqrt((k * k).sum() * (l * l).sum())


@given(seed=st.integers(0, 999), count=st.integers(2, 9), wide=st.integers(1, 6), thin=st.integers(1, 6))
def test_linear_cka(seed, count, wide, thin):
    x_NF, y_NF = drawn(seed, count, wide) + 3, drawn(seed + 1, count, thin)
    assert_close(linear_cka(x_NF, y_NF), cka(x_NF, y_NF))
    turned = 5 * x_NF @ torch.linalg.qr(drawn(seed + 2, wide, wide)).Q - 2
    assert_close(linear_cka(turned, x_NF), torch.tensor(1.0).double())
    assert_close(linear_cka(turned, y_NF), linear_cka(x_NF, y_NF))


def test_cka_of_large_activations_in_half_precision():
    x_NF = (1e6 * drawn(0, 40, 5)).bfloat16()
    assert_close(linear_cka(x_NF, 7 * x_NF), torch.tensor(1.0).double(), rtol=0, atol=1e-3)


def test_an_output_that_does_not_vary_is_similar_to_nothing():
    assert linear_cka(torch.ones(4, 3), torch.eye(4)) == 0


def test_similarities_of_neighbours():
    outputs = [drawn(number, 8, 3) for number in range(4)]
    expected = torch.stack([cka(outputs[number], outputs[number + 1]) for number in range(3)])
    assert_close(neighbour_similarities(iter(outputs)), expected)
    assert_close(neighbour_similarities(torch.stack(outputs)), expected)
    assert neighbour_similarities(outputs[:1]).tolist() == []


def merged(similarities, kept):
    """Clusters that grow: the two neighbours whose facing layers are the most alike become one, again and again."""
    clusters = [[layer] for layer in range(len(similarities) + 1)]
    while len(clusters) > kept:
        alike = [similarities[cluster[-1]] for cluster in clusters[:-1]]
        first = alike.index(max(alike))
        clusters[first : first + 2] = [clusters[first] + clusters[first + 1]]
    return clusters


@given(similarities=st.lists(st.integers(0, 6), max_size=12), data=st.data())
def test_crash(similarities, data):
    count = len(similarities) + 1
    kept = data.draw(st.integers(1, count))
    sources = crash_sources(torch.tensor(similarities).double() / 6, kept)
    clusters = merged(similarities, kept)
    assert sources == [cluster[len(cluster) // 2] for cluster in clusters for _ in cluster]
    assert len(set(sources)) == kept
    assert all(sources[source] == source for source in sources)
    assert sources == sorted(sources)


def test_crash_finds_blocks_of_similar_layers():
    first, second = drawn(0, 30, 6), drawn(1, 30, 6)
    outputs = [block + 0.05 * drawn(seed, 30, 6) for seed, block in enumerate(3 * [first] + 2 * [second], 5)]
    assert crash_sources(neighbour_similarities(outputs), 2) == [1, 1, 1, 4, 4]


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
