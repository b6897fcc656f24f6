"""RST: layers drawn at random in every step.

Random sparse tuning is the ablation in the IST paper (arXiv 2410.11772): the same number of layers trains in a step,
drawn uniformly.
"""

from dataclasses import dataclass

import torch

from siftune.base.numerics import draw_uniform
from siftune.base.settings import documented
from siftune.methods.drivers.layer_callback import LayerCallback
from siftune.methods.drivers.layer_driver import Compare, LayerChoice, LayerPolicy, LayerStack
from siftune.methods.options import RSTSettings, count_of


class RandomLayers(LayerPolicy):
    """Draws layers uniformly in every step; its only state is the generator's."""

    def __init__(self, stack: LayerStack, settings: RSTSettings, generator: torch.Generator) -> None:
        self._layers = len(stack.numbers)
        self._count = count_of(float(settings.active), self._layers)
        self._generator = generator

    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """Draw the layers of the next step."""
        return LayerChoice(step, tuple(draw_uniform(self._layers, self._count, self._generator).tolist()))


@documented
@dataclass(eq=False)
class RST(LayerCallback, RSTSettings):
    """Random sparse tuning, IST's ablation: the same number of layers, drawn uniformly.

    Args:
        seed: Seed of RST's own generator.
        layers: Path of the decoder layers, if their structure does not identify them.
        on_select: Callback for each step's choice, optional.

    Attributes:
        last: The `LayerChoice` of the current step; its `layers` are the numbers of the layers that train.

    Raises:
        RecipeError: A setting is out of its range.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[RST(active=0.5)])
        >>> output = trainer.train()
    """

    def policy(self, stack: LayerStack, generator: torch.Generator) -> RandomLayers:
        """Layers at random."""
        return RandomLayers(stack, self, generator)
