"""Safetensors files of kits and returns.

Names, shapes and dtypes in a file's header are compared with the manifest before a tensor is loaded. Loaded tensors are
mapped from the file, and take memory only when they are used.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from siftune.base.errors import KitError
from siftune.offsite.kit.strict import as_int, as_list, as_object, as_text, brief, shown

MAX_TENSORS = 100_000  # in a manifest
MAX_DIMS = 4
MAX_SIZE = 10**8  # of a dimension
MAX_VALUE = 65504.0  # (ours) of a weight, the largest number of float16; real ones stay far below
_PIECE = 1 << 18  # numbers that are looked at at a time
METADATA = {"format": "pt"}

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and data type of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # in safetensors' words: F32, BF16 or F16

    @property
    def bytes(self) -> int:
        """Bytes that the values take."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def spec_of(tensor: Tensor) -> TensorSpec:
    """Shape and data type of a tensor in memory.

    Raises:
        KitError: The format is not one of float32, bfloat16 and float16.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    if tensor.dtype not in names:
        raise KitError(f"a tensor is {tensor.dtype}; kits and returns hold float32, bfloat16 and float16 only")
    return TensorSpec(tuple(tensor.shape), names[tensor.dtype])


def parse_spec(value: Any, where: str) -> TensorSpec:
    """Check shape and dtype in JSON: {"shape": [576, 576], "dtype": "F32"}."""
    entry = as_object(value, where, ("dtype", "shape"))
    dtype = as_text(entry["dtype"], f"{where}.dtype", "|".join(DTYPES))
    sizes = as_list(entry["shape"], f"{where}.shape", MAX_DIMS)
    return TensorSpec(tuple(as_int(size, f"{where}.shape", 1, MAX_SIZE) for size in sizes), dtype)


class TensorFile:
    """An open safetensors file; `specs` has the shapes and dtypes of its header by name."""

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name = file, name
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        self.specs = {key: TensorSpec(tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}

    def read(self, name: str) -> Tensor:
        """Read a tensor, on the CPU."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def check_numbers(self) -> None:
        """Look at every number, a piece at a time.

        Raises:
            KitError: A number is NaN, infinite or far too large.
        """
        for name in self.specs:
            check_finite(self.read(name), f"{self._name}: {name}")


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file, of which only the header is read.

    Raises:
        KitError: It cannot be read, or is no safetensors file.
    """
    try:
        opened = safe_open(path, "pt")
    except (SafetensorError, OSError, RuntimeError) as error:  # the last where the memory cannot hold the file
        raise KitError(f"{path.name} cannot be read as safetensors ({brief(error)})") from error
    with opened as file:
        yield TensorFile(file, path.name)


def check_specs(specs: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec], where: str, by: str) -> None:
    """Compare what a file holds with what it must hold; `where` names the file, and `by` who says so, for the message.

    Raises:
        KitError: A tensor is missing, superfluous, or of another shape or dtype.
    """
    for name in expected:
        if name not in specs:
            raise KitError(f"{where} has no tensor {shown(name)}, which {by} has")
    for name, spec in specs.items():
        if name not in expected:
            raise KitError(f"{where} has a tensor {shown(name)}, which {by} lacks")
        if spec != expected[name]:
            raise KitError(f"{where}: {name} is {spec}, but {by} says {expected[name]}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; the tensors may be on any device.

    Raises:
        KitError: A value is NaN, infinite or too large, a dtype is not supported, or the file cannot be written.
    """
    plain = {}
    for name in tensors:
        tensor = tensors[name].detach()
        check_finite(tensor, f"{path.name}: {name}")
        spec_of(tensor)
        plain[name] = tensor.contiguous()
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(plain, path, METADATA)
        path.chmod(mode)  # the library closes its files to other users
    except (SafetensorError, OSError, RuntimeError) as error:  # the last if tensors share their memory
        raise KitError(f"{path.name} cannot be written ({brief(error)})") from error


def check_finite(tensor: Tensor, where: str) -> None:
    """Refuse NaN, infinity, and numbers so large that products of them become infinite; piece by piece.

    Raises:
        KitError: There is such a number. `where` is file and tensor, for the message.
    """
    flat = tensor.detach().reshape(-1)
    for start in range(0, len(flat), _PIECE):
        largest = float(flat[start : start + _PIECE].abs().max())  # NaN if one of them is
        if not math.isfinite(largest):
            raise KitError(f"{where} has values that are NaN or infinite")
        if largest > MAX_VALUE:
            raise KitError(f"{where} has the value {largest:g}; up to {MAX_VALUE:g} is allowed, on either side of 0")
