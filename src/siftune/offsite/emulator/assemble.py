"""Put compressed layers and the rest of a base model together to an emulator, in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from siftune.models.layers import find_layers
from siftune.offsite.emulator.compress import CompressedLayer
from siftune.offsite.emulator.model import Base, LayerShape, Split, build, emulator_config, frozen_names, outer_names


@dataclass(frozen=True)
class EmulatorParts:
    """All of an emulator. The tensors are read when they are asked for: some may lie in files."""

    config: PreTrainedConfig
    split: Split  # outer layers at either end
    middle: tuple[LayerShape, ...]  # shapes of the layers between
    frozen: Mapping[str, Tensor]  # tensors of everything but the outer layers, by name in the emulator's state dict
    outer: Mapping[str, Tensor]  # tensors of the outer layers, by the names of `model.outer_names`


class Tensors(Mapping[str, Tensor]):
    """Tensors that are got from their sources as they are asked for, and not kept."""

    def __init__(self, sources: Mapping[str, Callable[[], Tensor]]) -> None:
        self._sources = sources

    def __getitem__(self, name: str) -> Tensor:
        """Get a tensor."""
        return self._sources[name]()

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self._sources)

    def __len__(self) -> int:
        """Count them."""
        return len(self._sources)


def assemble(base: Base, layers: Sequence[CompressedLayer]) -> EmulatorParts:
    """Collect the tensors of an emulator with this middle; all others are the base's own, not copies."""
    split, middle = base.split, tuple(layer.shape for layer in layers)
    config = emulator_config(base.model.config, split, middle)
    if not getattr(base.model, "all_tied_weights_keys", None):
        # whatever the config says, transformers does not tie a head that differs from the embeddings in the checkpoint
        config.tie_word_embeddings = False
    skeleton = build(config, split, middle)
    decoder = find_layers(skeleton)
    compressed = {
        f"{decoder.path}.{number}.{name}": partial(layer.tensors.__getitem__, name)
        for number, layer in zip(split.middle(len(decoder.layers)), layers, strict=True)
        for name in layer.tensors
    }
    of_base = base.model.state_dict()
    frozen = {
        name: compressed.get(name) or partial(of_base.__getitem__, name) for name in frozen_names(skeleton, split)
    }
    outer = {neutral: of_base[name] for neutral, name in outer_names(base.model, split).items()}
    return EmulatorParts(config, split, middle, Tensors(frozen), outer)


def converted(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> Tensors:
    """Tensors in a dtype, converted as they are asked for; None leaves them."""

    def get(name: str) -> Tensor:
        return cast(tensors[name], dtype)

    return Tensors({name: partial(get, name) for name in tensors})


def materialise(parts: EmulatorParts, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Make a model of an emulator's parts, in one dtype if it is given.

    The outer layers' tensors are copied, so that training them leaves the base alone; frozen ones are shared with
    `parts`. Only the outer layers' parameters require gradients.
    """
    model = build(parts.config, parts.split, parts.middle, meta=False)
    names = outer_names(model, parts.split)
    state = {name: cast(tensor, dtype) for name, tensor in parts.frozen.items()}
    state |= {names[neutral]: cast(tensor, dtype).clone() for neutral, tensor in parts.outer.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    assert not empty, f"no weights for {empty[:3]}"
    outer = set(names.values())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in outer)
    model.config.dtype = next(model.parameters()).dtype
    return model.eval()


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in a dtype, if it is of floating point; None leaves it."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
