"""A static choice of layers for any transformers Trainer, and for plain training loops: the baseline of baselines."""

from dataclasses import dataclass

import torch

from siftune.base.errors import LayerError
from siftune.base.settings import documented
from siftune.methods.drivers.layer_callback import LayerCallback
from siftune.methods.drivers.layer_driver import Compare, LayerChoice, LayerPolicy, LayerStack
from siftune.methods.static.settings import StaticSettings
from siftune.models.layers import layer_numbers


class SameLayers(LayerPolicy):
    """The same layers in every step.

    Raises:
        LayerError: There is no such layer, or it has nothing to train.
    """

    def __init__(self, stack: LayerStack, settings: StaticSettings) -> None:
        numbers = layer_numbers(stack.depth, settings.numbers, "static.numbers")
        missing = [number for number in numbers if number not in stack.numbers]
        if missing:
            raise LayerError(
                f"static.numbers names layer {missing[0]}, which has nothing to train; attach adapters there, or name "
                f"others: {', '.join(map(str, stack.numbers))}"
            )
        self._positions = tuple(stack.numbers.index(number) for number in numbers)

    def choose(self, step: int, compare: Compare) -> LayerChoice:
        """Choose them again."""
        return LayerChoice(step, self._positions)


@documented
@dataclass(eq=False)
class Static(LayerCallback, StaticSettings):
    """The same layers in every step; adapters in other layers stay as they are.

    Args:
        seed: Of no effect; every method has one.
        layers: Path of the decoder layers, where they are not found by structure.

    Attributes:
        last: The `LayerChoice` of the current step: `layers` are the numbers of those that train.
        on_select: Called with each step's choice, where set.

    Raises:
        RecipeError: When a setting is out of its range.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[Static(numbers=(-2, -1))])
        >>> output = trainer.train()
    """

    def policy(self, stack: LayerStack, generator: torch.Generator) -> SameLayers:
        """The same layers."""
        return SameLayers(stack, self)
