"""What compression leaves out of a row, token by token."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from siftune.offsite.audits.calibration_attack import residuals


@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_shares_token_by_token(seed, rows, length, outputs):
    generator = torch.Generator().manual_seed(seed)
    whole, kept = (torch.randn(rows, length, outputs, generator=generator, dtype=torch.float64) for _ in range(2))
    real = torch.rand(rows, length, generator=generator) > 0.4
    real[:, 0] = True
    for row, found in enumerate(residuals(whole, kept, real).tolist()):
        lost = size = 0.0
        for t in range(length):
            if real[row, t]:
                lost += sum((a - b) ** 2 for a, b in zip(whole[row, t].tolist(), kept[row, t].tolist(), strict=True))
                size += sum(a**2 for a in whole[row, t].tolist())
        assert found == pytest.approx(math.log(lost / size))


def test_nothing_lost_and_nothing_written():
    whole = torch.stack([torch.ones(3, 2), torch.zeros(3, 2)])
    assert residuals(whole, whole, torch.ones(2, 3).bool()).tolist() == pytest.approx([math.log(1e-12)] * 2)
