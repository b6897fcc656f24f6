"""The compressed layers below a layer: what they give it, which is not what the base's give it *(ours)*.

Where layers are distilled, the hidden states that come out of the compressed ones go along from layer to layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from siftune.models.families import Family
from siftune.offsite.emulator.model import LayerShape, reshape
from siftune.offsite.emulator.recording import Recording, own


@dataclass
class Unfinished:
    """A layer of which some matrices are compressed.

    Attributes:
        layer: The base's.
        family: Where its matrices are.
        shape: What it looks like so far.
        tensors: Its parameters and buffers so far, by name.
    """

    layer: nn.Module
    family: Family
    shape: LayerShape
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Prefix:
    """What goes into one layer after compressed ones.

    Attributes:
        number: Number of the layer.
        recording: How its model calls it.
        hidden: (B, T, H) per batch.
    """

    number: int
    recording: Recording
    hidden: Sequence[Tensor] = field(repr=False)

    def outputs(self, of: Unfinished) -> list[Tensor]:
        """What comes out of the layer, as far as it is done; (B, T, H) per batch."""
        calls = [calls[self.number] for calls in self.recording.calls]
        with torch.no_grad(), in_place(of):
            return [call.run(of.layer, own(hidden)) for call, hidden in zip(calls, self.hidden, strict=True)]


@contextmanager
def in_place(of: Unfinished) -> Iterator[None]:
    """Have a layer use its compressed matrices, for the time of a block."""
    narrow = (*of.family.reads, of.family.writes) if of.shape.channels is not None else ()
    before = {path: of.layer.get_submodule(path) for path in (*of.shape.ranks, *narrow)}
    try:
        with torch.device("meta"):
            reshape(of.layer, of.family, of.shape)
        for path in before:
            state = {n.removeprefix(f"{path}."): t for n, t in of.tensors.items() if n.startswith(f"{path}.")}
            of.layer.get_submodule(path).load_state_dict(state, assign=True)
        yield
    finally:
        for path, module in before.items():
            of.layer.set_submodule(path, module)
