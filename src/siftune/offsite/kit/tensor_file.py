"""Tensor files of kits and returns, opened once: the bytes that are checked, hashed and loaded are the same.

If a file is exchanged after `read_kit`, loading notices: the hash is taken of the bytes that go into the tensors, and
must be that of the manifest that was read.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siftune.base.errors import KitError
from siftune.offsite.kit.manifest import FileSpec
from siftune.offsite.kit.strict import open_regular
from siftune.offsite.kit.tensors import DTYPES, TensorSpec, check_finite, read_header

_PIECE = 1 << 20  # bytes that are looked at at a time


@dataclass(frozen=True)
class _Mark:
    """Start of a tensor, and the hash of the file up to there and up to the tensor's end."""

    place: int
    before: Any
    after: bytes


class TensorFile:
    """A safetensors file, just opened, whose header has passed every check; `name` is for messages.

    All of it is read once, by `check` or by `load`. What `check` has passed can be read `again`, tensor by tensor.
    `specs` has shape and dtype by name, in the order of the header.

    Raises:
        KitError: The header is out of order.
    """

    def __init__(self, file: BufferedReader, name: str) -> None:
        header = read_header(file, name)
        self.specs: dict[str, TensorSpec] = header.specs
        self._file, self._order = file, header.order
        self._name, self._size = name, os.fstat(file.fileno()).st_size
        self._digest = hashlib.sha256(header.data)
        self._marks: dict[str, _Mark] = {}

    def check(self, expected: FileSpec) -> None:
        """Hash the file to its end and look at every number in it, a piece at a time: no tensor is allocated.

        Raises:
            KitError: Size or hash are not the manifest's, or a number is NaN, infinite or far too large.
        """
        expected.check_size(self._name, self._size)
        for name in self._order:
            place, before = self._file.tell(), self._digest.copy()
            for piece in self._pieces(self.specs[name]):
                check_finite(piece, f"{self._name}: {name}")
            self._marks[name] = _Mark(place, before, self._digest.digest())
        self._end(expected)

    def again(self, name: str) -> Tensor:
        """Read a tensor of a file that `check` has passed; its bytes must be those that were checked.

        Raises:
            KitError: The file has changed since.
        """
        mark = self._marks[name]
        self._file.seek(mark.place)
        self._digest = mark.before.copy()
        tensor = self._read(self.specs[name])
        if self._digest.digest() != mark.after:
            raise KitError(f"{self._name}: {name} changed after it was checked")
        return tensor

    def load(self, expected: FileSpec) -> dict[str, Tensor]:
        """Read the tensors, each into memory of its own on the CPU, in the order of `specs`, and hash what was read.

        Raises:
            KitError: Size or hash are not the manifest's.
        """
        expected.check_size(self._name, self._size)  # so no more memory is taken than the manifest speaks of
        tensors = {name: self._read(self.specs[name]) for name in self._order}
        self._end(expected)
        return {name: tensors[name] for name in self.specs}

    def _pieces(self, spec: TensorSpec) -> Iterator[Tensor]:
        """Read a tensor's numbers, always into the same memory; the next piece takes the place of the one before."""
        room, left = torch.empty(min(_PIECE, spec.bytes), dtype=torch.uint8), spec.bytes
        while left:
            part = room[:left]
            self._fill(part)
            left -= len(part)
            yield part.view(DTYPES[spec.dtype])

    def _read(self, spec: TensorSpec) -> Tensor:
        tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        self._fill(tensor.reshape(-1).view(torch.uint8))
        return tensor

    def _fill(self, memory: Tensor) -> None:
        """Read bytes into memory, and hash them."""
        room: Any = memory.numpy()
        if self._file.readinto(room) != len(room):
            raise KitError(f"{self._name} became shorter while it was read")
        self._digest.update(room)

    def _end(self, expected: FileSpec) -> None:
        """Refuse a file that does not end here, or is not the manifest's."""
        if self._file.read(1):
            raise KitError(f"{self._name} grew while it was read")
        expected.check_hash(self._name, self._digest.hexdigest())


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a tensor file, and check its header.

    Raises:
        KitError: It is no regular file, cannot be read, or its header is out of order.
    """
    with open_regular(path) as file:
        yield TensorFile(file, path.name)
