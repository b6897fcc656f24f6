"""A second kit of a matrix that moved: what the first kit kept of it moves along, in the first kit's directions (ours).

With Ŵ₁ = U D the first kit's form of W, and W' the matrix now:

    Ŵ₂ = Ŵ₁ + U U⁺ (W' − W) D⁺ D = U (I + M) D,   M = U⁺ (W' − W) D⁺

U U⁺ and D⁺ D project on the directions that U writes and D reads, so Ŵ₂ writes and reads no others. Who has both kits
learns M, R × R numbers of the change, and nothing if W' = W. A new fit of W' would lie in other directions, and two
kits would show the union of both.

Symbols: U `up_OR`, D `down_RI`, W' − W `change_OI`.
Shapes: O outputs, I inputs, R rank.
"""

import torch
from torch import Tensor


def moved_within(up_OR: Tensor, down_RI: Tensor, change_OI: Tensor) -> Tensor:
    """The second kit's D, beside a U that stays as it is.

    Args:
        up_OR: U.
        down_RI: D.
        change_OI: What W moved by.

    Returns:
        (I + M) D, (R, I), in float64.
    """
    up_OR, down_RI = up_OR.double(), down_RI.double()
    core_RR: Tensor = torch.linalg.pinv(up_OR) @ change_OI.double() @ torch.linalg.pinv(down_RI)
    return down_RI + core_RR @ down_RI
