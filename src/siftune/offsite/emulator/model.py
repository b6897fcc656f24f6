"""Emulators: models whose middle layers are smaller than their base's, and the split of both.

An emulator is an ordinary transformers model. In its middle layers, matrices are replaced by products of two thinner
ones, MLPs have fewer channels, or layers are missing or share the weights of others. Shapes alone describe it, so that
it can be built before any weight is read.

The first and last decoder layers of base and emulator are the *outer* ones, the others the *middle*. The outer layers'
tensors have names that do not depend on the model's depth, because an emulator may have fewer layers: `first.0.…` for
the layers next to the embeddings, `last.0.…` for those before the head.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from siftune.base.errors import LayerError
from siftune.models.families import Family, family_of
from siftune.models.layers import find_layers


@dataclass(frozen=True)
class Split:
    """Numbers of outer layers at either end."""

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


@dataclass(frozen=True)
class Base:
    """A base model and its split: the one view of it that the steps of `emulate` share.

    Raises:
        UnsupportedError: The model's family cannot be compressed.
        LayerError: The split leaves no middle.
    """

    model: PreTrainedModel  # without adapters, its weights in memory
    split: Split = field(default_factory=Split)

    def __post_init__(self) -> None:
        family_of(self.model.config)
        self.split.middle(self.depth)

    @property
    def family(self) -> Family:
        """The paths of the matrices in a layer."""
        return family_of(self.model.config)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """All decoder layers."""
        return find_layers(self.model).layers

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def middle(self) -> range:
        """Numbers of the layers to compress."""
        return self.split.middle(self.depth)


class FactoredLinear(nn.Module):
    """A linear map through a bottleneck: y = up(down(x)), in place of a Linear of the same in and out features."""

    def __init__(self, in_features: int, rank: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.rank, self.out_features = in_features, rank, out_features
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        y: Tensor = self.up(self.down(x))
        return y

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"in_features={self.in_features}, rank={self.rank}, out_features={self.out_features}"


@dataclass(frozen=True)
class LayerShape:
    """Shape of a middle layer of an emulator."""

    base: int  # number of the base's layer whose kind it is (models may alternate kinds of attention)
    # rank of every factored matrix, by its path in the layer; others are whole
    ranks: Mapping[str, int] = field(default_factory=dict)
    channels: int | None = None  # channels of the MLP; None for all. An MLP that has fewer is not factored


def build(config: PreTrainedConfig, split: Split, middle: Sequence[LayerShape], meta: bool = True) -> PreTrainedModel:
    """Build an emulator without weights: its parameters are on the meta device.

    Args:
        config: The emulator's config, from `emulator_config`.
        split: Outer layers at either end.
        middle: Shapes of the layers between.
        meta: Buffers on the meta device too; False gives buffers their values.
    """
    place: AbstractContextManager[Any] = torch.device("meta")
    if not meta:
        from accelerate import init_empty_weights

        place = init_empty_weights(include_buffers=False)
    with place:
        model = AutoModelForCausalLM.from_config(config)
        family = family_of(config)
        layers = find_layers(model).layers
        for number, shape in zip(split.middle(len(layers)), middle, strict=True):
            reshape(layers[number], family, shape)
    model.eval()
    return model


def emulator_config(config: PreTrainedConfig, split: Split, middle: Sequence[LayerShape]) -> PreTrainedConfig:
    """Derive an emulator's config from its base's: depth, and the kind of every layer where kinds alternate."""
    settings = config.to_dict()
    depth = config.num_hidden_layers
    bases = [*range(split.first), *(shape.base for shape in middle), *range(depth - split.last, depth)]
    new = AutoConfig.for_model(settings.pop("model_type"), **settings)
    new.num_hidden_layers = len(bases)
    if getattr(config, "layer_types", None):
        new.layer_types = [config.layer_types[base] for base in bases]
    return new


def reshape(layer: nn.Module, family: Family, shape: LayerShape) -> None:
    """Replace a decoder layer's matrices by smaller ones, uninitialised, in place."""
    for path, rank in shape.ranks.items():
        inputs, outputs, bias = features(layer.get_submodule(path))
        layer.set_submodule(path, FactoredLinear(inputs, rank, outputs, bias))
    channels = shape.channels
    if channels is None:
        return
    for path in (*family.reads, family.writes):
        inputs, outputs, bias = features(layer.get_submodule(path))
        inputs, outputs = (channels, outputs) if path == family.writes else (inputs, channels)
        layer.set_submodule(path, nn.Linear(inputs, outputs, bias))


def features(module: nn.Module) -> tuple[int, int, bool]:
    """In features, out features and whether there is a bias, of a Linear or a Conv1D."""
    weight: Any = module.weight
    outputs, inputs = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
    return inputs, outputs, module.bias is not None


def weight_OI(module: nn.Module) -> Tensor:
    """The weight of a Linear or a Conv1D as (out, in)."""
    weight: Any = module.weight
    return weight if isinstance(module, nn.Linear) else weight.T  # type: ignore[no-any-return]


def frozen_names(model: nn.Module, split: Split) -> list[str]:
    """Names in the state dict of what an emulator ships besides the outer layers, without a head tied to embeddings."""
    decoder = find_layers(model)
    outer = tuple(f"{decoder.path}.{number}." for number in split.outer(len(decoder.layers)))
    tied = tuple(getattr(model, "all_tied_weights_keys", None) or ())
    return [name for name in model.state_dict() if not name.startswith(outer) and name not in tied]
