"""Tensor files of kits and returns, opened once: what is checked, what is hashed and what is loaded are the same bytes.

No reading is trusted to be as the one before. A file that somebody exchanges after `read_kit` is noticed when it is
loaded: its hash is taken of the bytes that go into the tensors, and must be the one of the manifest that was read.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siftune.errors import KitError
from siftune.offsite.kit.manifest import FileSpec
from siftune.offsite.kit.strict import open_regular
from siftune.offsite.kit.tensors import DTYPES, TensorSpec, read_header


class TensorFile:
    """An open safetensors file whose header has passed every check; its tensors are read once, by either method.

    Args:
        file: The file, just opened.
        name: Its name, for messages.

    Attributes:
        specs: Name -> shape and dtype, in the order of the header.

    Raises:
        KitError: The header is out of order.
    """

    def __init__(self, file: BufferedReader, name: str) -> None:
        header = read_header(file, name)
        self.specs: dict[str, TensorSpec] = header.specs
        self._file, self._order = file, header.order
        self._name, self._size = name, os.fstat(file.fileno()).st_size
        self._digest = hashlib.sha256(header.data)

    def check(self, expected: FileSpec) -> None:
        """Hash the file to its end, allocating none of its tensors.

        Raises:
            KitError: Size or hash are not the manifest's.
        """
        expected.check_size(self._name, self._size)
        found = hashlib.file_digest(self._file, lambda: self._digest)
        expected.check_hash(self._name, found.hexdigest())

    def load(self, expected: FileSpec) -> dict[str, Tensor]:
        """Read the tensors, each into memory of its own, and hash what was read.

        Returns:
            Name -> tensor on the CPU, in the order of `specs`.

        Raises:
            KitError: Size or hash are not the manifest's.
        """
        expected.check_size(self._name, self._size)  # so no more memory is taken than the manifest speaks of
        tensors = {name: self._read(self.specs[name]) for name in self._order}
        if self._file.read(1):
            raise KitError(f"{self._name} grew while it was read")
        expected.check_hash(self._name, self._digest.hexdigest())
        return {name: tensors[name] for name in self.specs}

    def _read(self, spec: TensorSpec) -> Tensor:
        tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        room: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        if self._file.readinto(room) != spec.bytes:
            raise KitError(f"{self._name} became shorter while it was read")
        self._digest.update(room)
        return tensor


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a tensor file, and check its header.

    Raises:
        KitError: It is no regular file, cannot be read, or its header is out of order.
    """
    with open_regular(path) as file:
        yield TensorFile(file, path.name)


def load_tensors(path: Path, expected: FileSpec) -> dict[str, Tensor]:
    """Load a tensor file whose size and hash a manifest has; see `TensorFile.load`."""
    with open_tensors(path) as file:
        return file.load(expected)
