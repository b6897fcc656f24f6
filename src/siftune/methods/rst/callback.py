"""RST for any transformers Trainer, and for plain training loops.

Random sparse tuning is the ablation in the IST paper (arXiv 2410.11772): the same number of layers trains in a step,
drawn uniformly. LISA with `keep_state` is the same with draws that are held for some steps.
"""

from dataclasses import dataclass

import torch

from siftune.base.settings import documented
from siftune.methods.drivers.layer_callback import LayerCallback
from siftune.methods.drivers.layer_draws import draw_uniform, share
from siftune.methods.drivers.layer_driver import Compare, LayerChoice, LayerPolicy, LayerStack
from siftune.methods.rst.settings import RSTSettings


class RandomLayers(LayerPolicy):
    """Draws layers uniformly in every step; it has no state but the generator's."""

    def __init__(self, stack: LayerStack, settings: RSTSettings, generator: torch.Generator) -> None:
        self._layers = len(stack.numbers)
        self._count = share(settings.active, self._layers)
        self._generator = generator

    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """Draw the layers of the coming step."""
        return LayerChoice(step, tuple(draw_uniform(self._layers, self._count, self._generator).tolist()))


@documented
@dataclass(eq=False)
class RST(LayerCallback, RSTSettings):
    """Random sparse tuning, IST's ablation: as many layers, drawn uniformly.

    Args:
        seed: Seed of RST's own generator.
        layers: Path of the decoder layers, where they are not found by structure.

    Attributes:
        last: The `LayerChoice` of the current step: `layers` are the numbers of those that train.
        on_select: Called with each step's choice, where set.

    Raises:
        RecipeError: When a setting is out of its range.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[RST(active=0.5)])
        >>> output = trainer.train()
    """

    def policy(self, stack: LayerStack, generator: torch.Generator) -> RandomLayers:
        """Layers at random."""
        return RandomLayers(stack, self, generator)
