"""Draws of layers: how many a share is, and which.

Shapes: L layers, N drawn ones.
"""

import math

import torch
from torch import Tensor

from siftune.base.numerics import gumbel_top_k


def share(fraction: float, layers: int) -> int:
    """Number of layers in a share: max(1, ⌊fraction·layers⌋), immune to the rounding of the product."""
    return max(1, math.floor(fraction * layers + 1e-9))


def draw_layers(log_weights_L: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw layers one after the other, without replacement, with probability ∝ their weight.

    Args:
        log_weights_L: (L,) float64 logarithms of the weights.
        count: Layers to draw, 1 ≤ count ≤ L.
        generator: Source of randomness, on the CPU.

    Returns:
        (count,) int64 positions of layers, ascending.
    """
    uniform_L = torch.rand(log_weights_L.shape, generator=generator, dtype=torch.float64)
    return gumbel_top_k(log_weights_L, uniform_L, count)


def draw_uniform(layers: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of `layers` layers uniformly, without replacement; (count,) int64, ascending."""
    return draw_layers(torch.zeros(layers, dtype=torch.float64), count, generator)
