"""Safetensors files: a strict reader of their headers, which allocates no tensor, and a writer.

The format (safetensors 0.x): 8 bytes little-endian length of the header, the header in JSON, the tensors' bytes. The
header maps a name to {"dtype", "shape", "data_offsets"} and "__metadata__" to strings. Here the metadata is always
{"format": "pt"}; the tensors follow each other without gaps and fill the file.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from siftune.base.errors import KitError
from siftune.offsite.kit.strict import (
    as_int,
    as_list,
    as_map,
    as_object,
    as_text,
    brief,
    parse_json,
    shown,
)

MAX_HEADER = 4 << 20  # bytes
MAX_TENSORS = 100_000  # in a file
MAX_DIMS = 4
MAX_SIZE = 10**8  # of a dimension
MAX_VALUE = 65504.0  # (ours) of a weight, the largest number of float16; real ones stay far below
_PIECE = 1 << 18  # numbers that are looked at at a time
METADATA = {"format": "pt"}
NAME = r"[A-Za-z0-9_.]{1,200}"  # of a tensor

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


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    data: bytes  # the file's first bytes, up to the tensors
    specs: dict[str, TensorSpec]  # name -> shape and dtype, in the order of the header
    order: tuple[str, ...]  # the names in the order in which the tensors lie in the file


def read_header(file: BufferedReader, name: str) -> Header:
    """Read the header of a safetensors file, just opened, strictly, and allocate nothing for its tensors.

    The file is left where the tensors begin.

    Raises:
        KitError: Anything is out of order: length, JSON, metadata, names, dtypes, shapes, offsets, size of the file.
    """
    data_bytes = os.fstat(file.fileno()).st_size - 8
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if not 2 <= length <= min(MAX_HEADER, data_bytes):
        raise KitError(
            f"{name}: the length of its header is {length}; with this file's size it may be 2 to "
            f"{max(0, min(MAX_HEADER, data_bytes))}"
        )
    text = file.read(length)
    if text[:1] != b"{":
        raise KitError(f"{name}: its header does not begin with a brace")
    where = f"{name}: header"
    entries = as_map(parse_json(text, where), where, MAX_TENSORS)
    if entries.pop("__metadata__", None) != METADATA:
        raise KitError(f"{where}.__metadata__ is not {METADATA}")
    specs, order = _check_offsets(entries, data_bytes - length, where)
    return Header(start + text, specs, order)


def _check_offsets(
    entries: dict[str, Any], data_bytes: int, where: str
) -> tuple[dict[str, TensorSpec], tuple[str, ...]]:
    """Check that the tensors follow each other and fill the file; return their specs, and their order in it."""
    specs, places = {}, []
    for name, value in entries.items():
        field = f"{where}.{as_text(name, f'{where}, the name of a tensor', NAME)}"
        entry = as_object(value, field, ("data_offsets", "dtype", "shape"))
        spec = parse_spec({"dtype": entry["dtype"], "shape": entry["shape"]}, field)
        offsets = as_list(entry["data_offsets"], f"{field}.data_offsets", 2)
        begin, end = (as_int(offset, f"{field}.data_offsets", 0, data_bytes) for offset in (*offsets, -1, -1)[:2])
        if end - begin != spec.bytes:
            raise KitError(f"{field}.data_offsets span {end - begin} bytes, but {spec} takes {spec.bytes}")
        specs[name] = spec
        places.append((begin, end, name))
    places.sort()
    ends = [0, *(end for _, end, _ in places)]
    if [begin for begin, _, _ in places] != ends[:-1] or ends[-1] != data_bytes:
        raise KitError(f"{where}: the data_offsets leave gaps, overlap, or do not end where the file does")
    return specs, tuple(name for _, _, name in places)


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
    """Write a safetensors file, as the library writes it; one tensor is looked at at a time, so that they may be lazy.

    Each is asked for several times, and may be on any device.

    Raises:
        KitError: A value is NaN, infinite or too large, or the file cannot be written.
    """
    specs = {name: _checked_spec(tensors[name], f"{path.name}: {name}") for name in tensors}
    try:
        with path.open("wb") as file:
            _fill(file, specs, tensors)
    except OSError as error:
        raise KitError(f"{path.name} cannot be written ({brief(error)})") from error


def _checked_spec(tensor: Tensor, where: str) -> TensorSpec:
    check_finite(tensor, where)
    return spec_of(tensor)


def _fill(file: BufferedWriter, specs: Mapping[str, TensorSpec], tensors: Mapping[str, Tensor]) -> None:
    """Write header and tensors; the widest numbers come first, then the order is that of the names."""
    order = sorted(specs, key=lambda name: ([*DTYPES].index(specs[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": METADATA}
    end = 0
    for name in order:
        begin, end = end, end + specs[name].bytes
        header[name] = {"dtype": specs[name].dtype, "shape": specs[name].shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors are to lie at multiples of eight bytes
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(_bytes(tensors[name]))


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


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
