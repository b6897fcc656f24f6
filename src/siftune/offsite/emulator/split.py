"""The split of a model: the first and last decoder layers are the *outer* ones, what lies between is the *middle*.

The outer layers' tensors have names that do not depend on the model's depth, because an emulator may have fewer layers:
`first.0.…` for the layers next to the embeddings, `last.0.…` for those before the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from siftune.base.errors import LayerError
from siftune.models.layers import find_layers


@dataclass(frozen=True)
class Split:
    """How many outer layers there are at either end."""

    first: int = 2  # layers next to the embeddings
    last: int = 2  # layers before the head

    def middle(self, depth: int) -> range:
        """Numbers of the middle layers of a model with `depth` layers.

        Raises:
            LayerError: No layer is left between, or there are no outer ones.
        """
        if min(self.first, self.last) < 0 or self.first + self.last == 0:
            raise LayerError(
                f"there would be {self.first} first and {self.last} last outer layers; give counts of 0 or more, and "
                "at least one layer in all"
            )
        if self.first + self.last >= depth:
            raise LayerError(
                f"the model has {depth} layers: with {self.first} first and {self.last} last ones as outer layers no "
                "middle is left to compress; give smaller counts"
            )
        return range(self.first, depth - self.last)

    def outer(self, depth: int) -> list[int]:
        """Numbers of the outer layers in a model with `depth` layers."""
        return [*range(self.first), *range(depth - self.last, depth)]


def outer_names(model: nn.Module, split: Split) -> dict[str, str]:
    """Names of the outer layers' tensors, in a base model or an emulator of one without PEFT around it.

    Returns:
        Depth-independent name -> name in the model's state dict, of parameters and persistent buffers.
    """
    decoder = find_layers(model)
    depth = len(decoder.layers)
    names = {}
    for place, number in places(split, depth):
        for name in decoder.layers[number].state_dict():
            names[f"{place}.{name}"] = f"{decoder.path}.{number}.{name}"
    return names


def places(split: Split, depth: int) -> Sequence[tuple[str, int]]:
    """Neutral name and number of each of the outer layers, in a model with `depth` layers."""
    first = [(f"first.{i}", i) for i in range(split.first)]
    return [*first, *((f"last.{i}", depth - split.last + i) for i in range(split.last))]
