"""Cut for any transformers Trainer, and for plain training loops."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from siftune.methods.cut import maths
from siftune.methods.cut.settings import CutSettings
from siftune.methods.layer_callback import LayerCallback
from siftune.methods.layer_driver import Compare, LayerChoice, LayerPolicy, LayerStack
from siftune.settings import documented


class LayersAbove(LayerPolicy):
    """All layers above a depth, which is drawn and held for `hold` optimizer steps.

    Args:
        stack: The layers.
        settings: Cut's.
        generator: Source of randomness, on the CPU.
    """

    def __init__(self, stack: LayerStack, settings: CutSettings, generator: torch.Generator) -> None:
        self._layers = len(stack.numbers)
        self._settings = settings
        self._generator = generator
        self._lowest: int | None = None
        if settings.compensate:
            self.step_lengths = maths.lengths(maths.chances(settings.depths, self._layers))

    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """Hold the cut, or draw another if it is time."""
        if step % self._settings.hold == 0 or self._lowest is None:
            depth = maths.draw_depth(self._settings.depths, self._generator)
            self._lowest = maths.lowest_layer(depth, self._layers)
        return LayerChoice(step, tuple(range(self._lowest, self._layers)))

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state: the position of the lowest layer that trains."""
        return {"lowest": self._lowest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`."""
        self._lowest = state["lowest"]


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
