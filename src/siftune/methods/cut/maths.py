"""Cut (ours): all layers above a random depth train, so that backward ends there.

Layers at random leave backward little to save: it ends at the lowest of them, which mostly lies deep. Here the layers
that train are the upper ones, from a depth that is drawn anew in every step:

    draw      d ~ uniform over `depths`, d ∈ [0, 1)
    cut       c = ⌊d·L⌋;  layers c … L−1 train, layers 0 … c−1 do not, and backward ends at layer c
    chance    p_ℓ = #{d ∈ depths: ⌊d·L⌋ ≤ ℓ} / #depths, which grows with ℓ: the top layer always trains
    length    with `compensate`: θ_ℓ ← θ_ℓ + (1/p_ℓ − 1)·Δ_ℓ, Δ_ℓ the change that the optimizer has just made

Symbols: L layers that have something to train, d `depth`, c `lowest_layer`, p `chances`, 1/p `lengths`. A draw that is
held for some steps (`hold`) leaves p as it is.

**Unbiasedness.** The forward pass does not depend on the draw, so that a layer that trains gets the gradient g_ℓ that
plain training has at these weights, with one exception: *clipping* sees the layers that train alone, whose norm is
smaller, and so clips less. Where it bites, nothing below is exact.

- *SGD*: without `compensate` the expected step is −η·p_ℓ·g_ℓ, so lower layers learn at a lower rate. With it the
  expectation over the draw is −η·g_ℓ, plain training's step, for all layers with p_ℓ > 0. The price: the mean square
  of the step is 1/p_ℓ times as large. Decoupled weight decay is part of Δ, and so is compensated too. With momentum
  the same holds of all that one gradient moves in the end, not of each step: a layer's momentum moves at its own
  visits alone.
- *Adam* makes steps of like length whatever the scale of the gradient, so that 1/p on the gradient would do nothing;
  hence it is put on the step. Its moments are running means over the layer's visits: they estimate the same means from
  fewer gradients, and reach 1/p_ℓ times as far back. The expected step is plain training's as far as gradients are
  stationary over that span, and no further.

**Memory.** Below the cut no activation is kept. The peak is that of the lowest cut: with 0 among the depths it is
plain training's, in a quarter of the steps by default. Depths of (0.25, 0.25, 0.5, 0.75) lower it: the lowest quarter
never trains (p = 0), and its activations are never kept. The optimizer has a state for each layer that trains at some
time.

**Activation checkpointing.** Layers below the cut run once: they are not recomputed, for backward does not come there.

**Several ranks.** All draw the same depth. The layers below get zeros, which are dropped before the optimizer's step,
so the ranks exchange as much as in plain training. Δ is the same on every rank, and so is what is added.
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


def chances(depths: Sequence[float], layers: int) -> list[float]:
    """Chance of each layer to train in a step, from the lowest; 0 for layers below every depth."""
    lowest = [lowest_layer(depth, layers) for depth in depths]
    return [sum(cut <= layer for cut in lowest) / len(depths) for layer in range(layers)]


def lengths(chances_L: Sequence[float]) -> list[float]:
    """How many times as long the steps of each layer are, 1/p; 1 for layers that never train."""
    return [1 / p if p > 0 else 1.0 for p in chances_L]
