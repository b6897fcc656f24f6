"""Moments and curvature of rows that are there at once, by the sums that `emulate` makes of its batches."""

from torch import Tensor

from siftune.base.numerics import widened
from siftune.offsite.emulator.curvature import Sums
from siftune.offsite.emulator.record import Captured
from siftune.offsite.maths.kfac import Curvature, Moments, MomentSum


def moments(rows_NF: Tensor) -> Moments:
    """The second moment of rows."""
    total = MomentSum(len(rows_NF))
    total.add(rows_NF)
    return total.moments()


def curvature(x_NI: Tensor, g_NO: Tensor) -> Curvature:
    """The curvature of the loss for W in y = W x, by inputs and gradients of the summed loss for outputs."""
    sums = Sums(len(x_NI))
    sums.add({"matrix": Captured(widened(x_NI), widened(g_NO))})
    return sums.curvature().curvature["matrix"]
