"""Cut (ours): all layers above a random depth train, and backward ends there.

Layers drawn at random save little of backward: it ends at the lowest of them, which is usually deep. Here the upper
layers train, from a depth that is drawn in every step:

    draw      d ~ uniform over `DEPTHS`, d ∈ [0, 1)
    cut       c = ⌊d·L⌋;  layers c … L−1 train, layers 0 … c−1 do not, and backward ends at layer c

Symbols: L layers with trainable parameters, d `depth`, c `lowest_layer`. A layer trains with probability
p_ℓ = #{d ∈ DEPTHS: ⌊d·L⌋ ≤ ℓ} / #DEPTHS, which grows with ℓ: the top layer always trains.

**Gradients.** The forward pass does not depend on the draw. A layer that trains therefore gets the gradient g_ℓ of
plain training at these weights. Only *clipping* differs: it sees the smaller norm of the layers that train, and clips
less. The expected step of SGD is −η·p_ℓ·g_ℓ, so lower layers learn at a lower rate. Adam's moments are running means
over the steps in which the layer trains, and reach 1/p_ℓ times as far back.

**Memory.** No activation is saved below the cut. The peak is that of the lowest cut. Since 0 is one of the depths, it
equals the peak of plain training, in a quarter of the steps.

**Activation checkpointing.** Layers below the cut run once, since backward does not reach them.

**Several ranks.** All draw the same depth. The layers below get zeros, which are dropped before the optimizer's step,
so the ranks exchange as much as in plain training.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from siftune.base.settings import documented
from siftune.methods.drivers.layer_callback import LayerCallback
from siftune.methods.drivers.layer_driver import Compare, LayerChoice, LayerPolicy, LayerStack
from siftune.methods.options import CutSettings

DEPTHS = (0.0, 0.25, 0.5, 0.75)
"""Shares of the layers below the cut; one is drawn per step, uniformly."""


def lowest_layer(depth: float, layers: int) -> int:
    """Position of the lowest layer that trains, ⌊depth·layers⌋, without rounding errors of the product."""
    return min(math.floor(depth * layers + 1e-9), layers - 1)


def draw_depth(depths: Sequence[float], generator: torch.Generator) -> float:
    """Draw one of the depths uniformly; the generator is on the CPU."""
    return depths[int(torch.randint(len(depths), (), generator=generator))]


class LayersAbove(LayerPolicy):
    """All layers above a depth that is drawn in every step; its only state is the generator's."""

    def __init__(self, stack: LayerStack, generator: torch.Generator) -> None:
        self._layers = len(stack.numbers)
        self._generator = generator

    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """Draw the cut of the next step."""
        lowest = lowest_layer(draw_depth(DEPTHS, self._generator), self._layers)
        return LayerChoice(step, tuple(range(lowest, self._layers)))


@documented
@dataclass(eq=False)
class Cut(LayerCallback, CutSettings):
    """Cut (ours): all layers above a random depth train, and backward ends there.

    Args:
        seed: Seed of Cut's own generator.
        layers: Path of the decoder layers, if their structure does not identify them.

    Attributes:
        last: The `LayerChoice` of the current step; its `layers` are the numbers of the layers that train.
        on_select: Callback for each step's choice, optional.

    Example:
        >>> cut = Cut()
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[cut])
        >>> output = trainer.train()
        >>> cut.last.layers[-1]
        3
    """

    def policy(self, stack: LayerStack, generator: torch.Generator) -> LayersAbove:
        """All layers above a random depth."""
        return LayersAbove(stack, generator)
