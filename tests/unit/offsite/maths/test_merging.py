"""Merging against plain loops over numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftune.offsite.maths.merging import mean, shares


def draw(count, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=3)


@given(count=st.integers(1, 7), shape=SHAPES, seed=st.integers(0, 99), data=st.data())
def test_the_mean_is_a_sum_over_returns(count, shape, seed, data):
    updates = draw(count, shape, seed)
    weights = data.draw(st.lists(st.floats(0.01, 1e4), min_size=count, max_size=count))
    total, wanted = sum(weights), torch.zeros(shape, dtype=torch.float64)
    for update, weight in zip(updates, weights, strict=True):
        wanted = wanted + update * weight / total
    torch.testing.assert_close(mean(updates, shares(weights)), wanted, rtol=1e-12, atol=1e-13)


def test_weights_may_be_as_large_as_numbers_get():
    assert shares([1.7e308, 1.7e308, 1.7e308, 1.7e308]) == [0.25] * 4
    assert shares([1e-300, 3e-300]) == pytest.approx([0.25, 0.75])
