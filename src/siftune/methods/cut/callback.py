"""Cut for any transformers Trainer, and for plain training loops."""

from dataclasses import dataclass

import torch

from siftune.base.settings import documented
from siftune.methods.cut import maths
from siftune.methods.cut.settings import CutSettings
from siftune.methods.drivers.layer_callback import LayerCallback
from siftune.methods.drivers.layer_driver import Compare, LayerChoice, LayerPolicy, LayerStack


class LayersAbove(LayerPolicy):
    """All layers above a depth that is drawn in every step; it has no state but the generator's."""

    def __init__(self, stack: LayerStack, settings: CutSettings, generator: torch.Generator) -> None:
        self._layers = len(stack.numbers)
        self._depths = settings.depths
        self._generator = generator

    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """Draw the coming step's cut."""
        lowest = maths.lowest_layer(maths.draw_depth(self._depths, self._generator), self._layers)
        return LayerChoice(step, tuple(range(lowest, self._layers)))


@documented
@dataclass(eq=False)
class Cut(LayerCallback, CutSettings):
    """Cut (ours): all layers above a random depth train, and backward ends there.

    Args:
        seed: Seed of Cut's own generator.
        layers: Path of the decoder layers, where they are not found by structure.

    Attributes:
        last: The `LayerChoice` of the current step: `layers` are the numbers of those that train.
        on_select: Called with each step's choice, where set.

    Raises:
        RecipeError: When a setting is out of its range.

    Example:
        >>> cut = Cut(depths=(0.25, 0.25, 0.5, 0.75))  # of the model's four layers the lowest never trains
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[cut])
        >>> output = trainer.train()
        >>> cut.last.layers[-1]
        3
    """

    def policy(self, stack: LayerStack, generator: torch.Generator) -> LayersAbove:
        """All layers above a random depth."""
        return LayersAbove(stack, self, generator)
