"""A second kit's matrix: in the first one's directions, and otherwise as near as it gets."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from siftune.offsite.maths.subspace import moved_within


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(outputs=st.integers(3, 8), inputs=st.integers(3, 8), rank=st.integers(1, 3), seed=st.integers(0, 99))
def test_what_moved_is_projected_from_both_sides(outputs, inputs, rank, seed):
    up, down, change = draw(seed, outputs, rank), draw(seed + 1, rank, inputs), draw(seed + 2, outputs, inputs)
    found = moved_within(up, down, change)
    left, right = (torch.linalg.qr(part).Q for part in (up, down.T))  # another way to the projections
    wanted = up @ down + left @ left.T @ change @ right @ right.T
    torch.testing.assert_close(up @ found, wanted, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found @ right @ right.T, found, rtol=1e-9, atol=1e-10)  # reads nothing else


def test_what_moved_in_other_directions_leaves_no_trace():
    up, down = draw(0, 6, 2), draw(1, 2, 5)
    left, right = (torch.linalg.qr(part, mode="complete").Q for part in (up, down.T))
    unseen = left[:, 2:] @ draw(2, 4, 5) + draw(3, 6, 3) @ right[:, 2:].T
    torch.testing.assert_close(moved_within(up, down, unseen), down, rtol=1e-9, atol=1e-12)
    assert float((moved_within(up, down, up @ down) - 2 * down).abs().max()) < 1e-12
