"""What the middle layers saw of the calibration rows, as `record` leaves it.

Shapes: B rows, T positions, H hidden size, N real tokens of all batches, F features.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from siftune.base.files import write_beside


class States:
    """Tensors by number of the layer, one per batch, on the CPU.

    Args:
        folder: Where they lie, one file per layer, there whole or not at all; None keeps them in memory.
        name: Start of the files' names.
    """

    def __init__(self, folder: Path | None = None, name: str = "") -> None:
        self._folder, self._name = folder, name
        self._here: dict[int, list[Tensor]] = {}

    def beside(self, name: str) -> "States":
        """Others of another name, kept as these are."""
        return States(self._folder, name)

    def put(self, number: int, batches: Sequence[Tensor]) -> None:
        """Keep a layer's tensors."""
        plain = [tensor.detach().cpu() for tensor in batches]
        if self._folder is None:
            self._here[number] = plain
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with write_beside(self._file(self._folder, number)) as [beside]:
            save_file({str(place): tensor.contiguous() for place, tensor in enumerate(plain)}, beside)

    def get(self, number: int) -> list[Tensor]:
        """A layer's tensors, not to be changed in place; those of a folder are read as they are used."""
        if self._folder is None:
            return self._here[number]
        found = load_file(self._file(self._folder, number))
        return [found[str(place)] for place in range(len(found))]

    def has(self, number: int) -> bool:
        """Whether a layer's tensors are there."""
        return number in self._here if self._folder is None else self._file(self._folder, number).exists()

    def drop(self, number: int) -> None:
        """Free memory; what lies in a folder stays, for a run that may have to go on."""
        self._here.pop(number, None)

    def _file(self, folder: Path, number: int) -> Path:
        return folder / f"{self._name}-{number:04d}.safetensors"


@dataclass(frozen=True)
class Call:
    """How a layer is called, hidden states apart: masks, positions, and what else its model hands it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden_BTH: Tensor) -> Tensor:
        """Run a layer so; (B, T, H)."""
        device = next(layer.parameters()).device
        if device.type != "meta":  # else accelerate moves it
            hidden_BTH = hidden_BTH.to(device)
        output: Tensor = layer(hidden_BTH, *self.args, **self.kwargs)
        return output


@dataclass(frozen=True)
class Visit:
    """One batch's visit to one layer."""

    call: Call
    hidden_BTH: Tensor  # what went in
    grad_BTH: Tensor  # gradient of the summed loss for what came out
    real_BT: Tensor  # bool; false on padding


@dataclass
class Recording:
    """What the middle layers saw; hidden states and gradients in the model's dtype."""

    numbers: Sequence[int]  # numbers of these layers
    hidden: States  # what goes into a layer, by its number; what comes out is what goes into the next
    grads: States  # gradients of the summed loss for what comes out, by number of the layer
    # what layers' matrices would cost, by what that depends on
    measured: dict[Hashable, States] = field(default_factory=dict)
    calls: list[list[Call]] = field(default_factory=list)  # by batch, then by number of the layer
    real: list[Tensor] = field(default_factory=list)  # (B, T) bool per batch: false on padding
    tokens: int = 0  # labels of all batches
    loss: float = 0.0  # mean loss per label
    # the gradients of all these layers are there; else those of the last one, and each `replay` adds those of the
    # layer below
    whole: bool = True

    def visits(self, number: int) -> Iterator[Visit]:
        """The visits to a layer, one per batch."""
        calls = [calls[number] for calls in self.calls]
        for parts in zip(calls, self.hidden.get(number), self.grads.get(number), self.real, strict=True):
            yield Visit(*parts)

    def costs(self, of: Hashable) -> States:
        """Where measured costs of layers are kept, by number; jobs of which `of` is the same share them."""
        return self.measured.setdefault(of, self.hidden.beside("cost"))

    def outputs(self, number: int) -> Tensor:
        """Outputs of a layer at the real tokens of all batches; (N, H) float32."""
        return torch.cat([rows_of(h, real) for h, real in zip(self.hidden.get(number + 1), self.real, strict=True)])

    def forget(self, number: int) -> None:
        """Free the memory of a layer that is done with."""
        self.hidden.drop(number)
        self.grads.drop(number)


@dataclass(frozen=True)
class Captured:
    """What one matrix saw: float32, where the layer is; padding is left out."""

    x_NI: Tensor  # inputs
    g_NO: Tensor  # gradients of the summed loss for its outputs


def rows_of(x_BTF: Tensor, real_BT: Tensor) -> Tensor:
    """Real tokens of a (B, T, F) tensor as float32 rows (N, F); OPT hands its MLP rows that are flat already."""
    flat = x_BTF.detach().reshape(-1, x_BTF.shape[-1])
    return flat[real_BT.flatten().to(flat.device)].float()


def own(hidden: Tensor) -> Tensor:
    """A copy that a layer may go on with in place."""
    return hidden.detach().clone()
