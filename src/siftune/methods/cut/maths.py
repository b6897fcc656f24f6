"""Cut (ours): all layers above a random depth train, so that backward ends there.

Layers at random leave backward little to save: it ends at the lowest of them, which mostly lies deep. Here the layers
that train are the upper ones, from a depth that is drawn anew in every step:

    draw      d ~ uniform over `depths`, d ∈ [0, 1)
    cut       c = ⌊d·L⌋;  layers c … L−1 train, layers 0 … c−1 do not, and backward ends at layer c

Symbols: L layers that have something to train, d `depth`, c `lowest_layer`. A layer trains with the chance
p_ℓ = #{d ∈ depths: ⌊d·L⌋ ≤ ℓ} / #depths, which grows with ℓ: the top layer always trains.

**What a layer learns from.** The forward pass does not depend on the draw, so that a layer that trains gets the
gradient g_ℓ that plain training has at these weights; *clipping* alone sees the layers that train, whose norm is
smaller, and so clips less. The expected step of SGD is −η·p_ℓ·g_ℓ: lower layers learn at a lower rate. Adam's moments
are running means over the layer's visits, and reach 1/p_ℓ times as far back.

**Memory.** Below the cut no activation is kept. The peak is that of the lowest cut: with 0 among the depths it is
plain training's, in a quarter of the steps by default. Depths of (0.25, 0.25, 0.5, 0.75) lower it: the lowest quarter
never trains (p = 0), and its activations are never kept. The optimizer has a state for each layer that trains at some
time.

**Activation checkpointing.** Layers below the cut run once: they are not recomputed, for backward does not come there.

**Several ranks.** All draw the same depth. The layers below get zeros, which are dropped before the optimizer's step,
so the ranks exchange as much as in plain training.
"""

import math
from collections.abc import Sequence

import torch


def lowest_layer(depth: float, layers: int) -> int:
    """Position of the lowest layer that trains, ⌊depth·layers⌋, immune to the rounding of the product."""
    return min(math.floor(depth * layers + 1e-9), layers - 1)


def draw_depth(depths: Sequence[float], generator: torch.Generator) -> float:
    """Draw one of the depths, evenly; the generator is on the CPU."""
    return depths[int(torch.randint(len(depths), (), generator=generator))]
