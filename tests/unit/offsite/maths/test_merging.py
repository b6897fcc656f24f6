"""Merging against plain loops over numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftune.offsite.maths.merging import mean, shares, trimmed_count, trimmed_mean


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


@given(count=st.integers(3, 11), shape=SHAPES, seed=st.integers(0, 99), share=st.floats(0.01, 0.49))
def test_the_trimmed_mean_is_a_mean_of_sorted_numbers(count, shape, seed, share):
    updates = draw(count, shape, seed)
    dropped = max(1, int(share * count))
    wanted = []
    for column in updates.reshape(count, -1).T.tolist():
        left = sorted(column)[dropped : count - dropped]
        wanted.append(sum(left) / len(left))
    found = trimmed_mean(updates, share)
    assert found.shape == updates.shape[1:]
    assert found.flatten().tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-14)


@given(count=st.integers(3, 9), seed=st.integers(0, 99), place=st.integers(0, 8), wild=st.floats(-1e9, 1e9))
def test_one_bad_return_of_three_or_more_stays_within_the_others(count, seed, place, wild):
    updates = draw(count, (5,), seed)
    updates[place % count] = wild
    others = torch.stack([u for number, u in enumerate(updates) if number != place % count])
    found = trimmed_mean(updates, 0.2)
    assert bool((others.min(0).values - 1e-9 <= found).all())
    assert bool((found <= others.max(0).values + 1e-9).all())


@pytest.mark.parametrize(
    ("count", "share", "dropped"),
    [(3, 0.2, 1), (9, 0.2, 1), (10, 0.2, 2), (10, 0.3, 3), (4, 0.49, 1), (4, 0.4999999999, 1)],
)
def test_how_many_are_trimmed(count, share, dropped):
    assert trimmed_count(count, share) == dropped
