"""What goes from layer to layer: one tensor per batch, in memory, or in a folder from which a cut run goes on."""

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from siftune.files import write_beside


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
