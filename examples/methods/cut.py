"""Cut: all layers above a random depth train, and backward ends there. A method of ours outside the package.

    trainer = Trainer(model, args, train_dataset=rows, callbacks=[Cut()])

Layers drawn at random save little of backward: it ends at the lowest of them, which is usually deep. Here the upper
layers train, from a depth that is drawn in every step:

    draw      d ~ uniform over `DEPTHS`, d ∈ [0, 1)
    cut       c = ⌊d·L⌋;  layers c … L−1 train, layers 0 … c−1 do not, and backward ends at layer c

Symbols: L layers with trainable parameters, d `depth`, c `lowest`. A layer trains with probability
p_ℓ = #{d ∈ DEPTHS: ⌊d·L⌋ ≤ ℓ} / #DEPTHS, which grows with ℓ: the top layer always trains. The forward pass does not
depend on the draw, so a layer that trains gets the gradient of plain training at these weights. The expected step of
SGD is −η·p_ℓ·g_ℓ: lower layers learn at a lower rate.
"""

import math
from dataclasses import dataclass

import torch

from siftune.methods.drivers.layer_callback import LayerCallback
from siftune.methods.drivers.layer_driver import Compare, LayerChoice, LayerPolicy, LayerStack

DEPTHS = (0.0, 0.25, 0.5, 0.75)
"""Shares of the layers below the cut; one is drawn per step, uniformly."""


class LayersAbove(LayerPolicy):
    """All layers above a depth that is drawn in every step; its only state is the generator's."""

    def __init__(self, stack: LayerStack, generator: torch.Generator) -> None:
        self._layers = len(stack.numbers)
        self._generator = generator

    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """Draw the cut of the next step."""
        depth = DEPTHS[int(torch.randint(len(DEPTHS), (), generator=self._generator))]
        lowest = math.floor(depth * self._layers + 1e-9)
        return LayerChoice(step, tuple(range(lowest, self._layers)))


@dataclass(eq=False)
class Cut(LayerCallback):
    """All layers above a random depth train.

    Args:
        seed: Seed of the method's own generator.
        layers: Path of the decoder layers, if their structure does not identify them.
    """

    group = "cut"

    def policy(self, stack: LayerStack, generator: torch.Generator) -> LayersAbove:
        """All layers above a random depth."""
        return LayersAbove(stack, generator)
