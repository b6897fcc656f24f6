"""Read untrusted files, check single untrusted values, and write folders in one move.

No file is trusted: it must be a regular file (no link, folder, pipe or device), and its size is checked before it is
read or given to safetensors. A `Check` takes a value and its place, for the error message.

The checks cover what is on disk at the time. A folder that others can write to while it is read is not safe: copy it
first.
"""

import contextlib
import hashlib
import json
import os
import re
import reprlib
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from siftune.base.errors import KitError
from siftune.base.files import new_folder
from siftune.base.text import one_line

_OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def shown(value: Any) -> str:
    """An untrusted value for a message: short, and without control characters."""
    return _short.repr(value)


def brief(error: BaseException) -> str:
    """The message of an exception on one line, cut short, without control characters."""
    return one_line(str(error).rstrip(". \n"))


@contextlib.contextmanager
def naming(folder: str) -> Iterator[None]:
    """Begin an error message with the folder, and end it with advice."""
    try:
        yield
    except KitError as error:
        raise KitError(f"{folder}: {error}; ask whoever made it for a sound copy") from error


def list_files(folder: Path, limits: Mapping[str, int]) -> dict[str, int]:
    """List a folder that may hold certain regular files only; the folder itself may be reached by a link.

    Args:
        folder: The folder.
        limits: Name -> bytes that it may have at most, of every file that may be there.

    Returns:
        Name -> bytes, of those that are there.

    Raises:
        KitError: There is no such folder, or something else is in it, or a file is too large.
    """
    try:
        with os.scandir(folder) as entries:
            return {entry.name: _size(entry, limits) for entry in entries}
    except OSError as error:
        raise KitError(f"the folder cannot be read ({error.strerror})") from error


def _size(entry: "os.DirEntry[str]", limits: Mapping[str, int]) -> int:
    if entry.name not in limits:
        raise KitError(f"{shown(entry.name)} is in it and does not belong there")
    info = entry.stat(follow_symlinks=False)
    if not stat.S_ISREG(info.st_mode):
        raise KitError(f"{entry.name} is a link, a folder or a device, not a file")
    if info.st_size > limits[entry.name]:
        raise KitError(f"{entry.name} has {info.st_size} bytes, more than the {limits[entry.name]} that are allowed")
    return info.st_size


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading; links are not followed and a pipe is not waited for.

    Raises:
        KitError: It cannot be opened, is not a regular file, or cannot be read.
    """
    try:
        with open(os.open(path, _OPEN), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise KitError(f"{path.name} is a folder or a device, not a file")
            yield file
    except OSError as error:
        raise KitError(f"{path.name} cannot be read ({error.strerror})") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise KitError(f"{path.name} has more than the {limit} bytes that are allowed")
    return data


def sha256_of(path: Path) -> str:
    """SHA-256 of a regular file in hexadecimal, read piece by piece."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(data: bytes, name: str) -> Any:
    """Parse JSON; the caller limits its size, and `name` stands in messages.

    Raises:
        KitError: It is no JSON, or has NaN or infinity.
    """
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_constant)
    except (RecursionError, ValueError) as error:
        raise KitError(f"{name} is not proper JSON ({brief(error)})") from error


def _constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def as_object(value: Any, where: str, required: Collection[str] = (), optional: Collection[str] = ()) -> dict[str, Any]:
    """An object with exactly the keys that it must and may have.

    Raises:
        KitError: It is no object, or a key is missing or unknown. `where` is file and field, for the message.
    """
    if not isinstance(value, dict):
        raise KitError(f"{where} is {shown(value)}, not an object")
    for key in required:
        if key not in value:
            raise KitError(f"{where} has no {key}")
    for key in value:
        if key not in required and key not in optional:
            raise KitError(f"{where} has the unknown key {shown(key)}")
    return value


def as_map(value: Any, where: str, most: int) -> dict[str, Any]:
    """An object of one to `most` entries under any keys."""
    if not isinstance(value, dict) or not 1 <= len(value) <= most:
        fault = f"has {len(value)} entries" if isinstance(value, dict) else f"is {shown(value)}"
        raise KitError(f"{where} {fault}; it must be an object with 1 to {most} entries")
    return value


def as_list(value: Any, where: str, most: int) -> list[Any]:
    """A list of at most `most` items."""
    if not isinstance(value, list) or len(value) > most:
        fault = f"has {len(value)} items" if isinstance(value, list) else f"is {shown(value)}"
        raise KitError(f"{where} {fault}; it must be a list of at most {most}")
    return value


def as_int(value: Any, where: str, low: int, high: int) -> int:
    """A whole number from `low` to `high`; true and 1.0 are none."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise KitError(f"{where} is {shown(value)}, not a whole number from {low} to {high}")
    return value


def as_text(value: Any, where: str, pattern: str) -> str:
    """A string that matches a regular expression from end to end."""
    if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
        raise KitError(f"{where} is {shown(value)}, which is not of the form {pattern}")
    return value


@contextlib.contextmanager
def fresh_folder(out: str | Path) -> Iterator[Path]:
    """Have a folder, missing or empty, filled beside its place and moved there; after an error nothing is left behind.

    Raises:
        ModelError: `out` is in use.
        KitError: It cannot be written, as on a full disk.
    """
    try:
        with new_folder(out) as folder:
            yield folder
    except OSError as error:
        reason = error.strerror or str(error)
        raise KitError(f"{out} cannot be written ({reason}); free space, or give another place") from error


Check = Callable[[Any, str], object]


def whole(low: int, high: int) -> Check:
    """A whole number from `low` to `high`."""
    return lambda value, where: as_int(value, where, low, high)


def number(low: float, high: float) -> Check:
    """A number from `low` to `high`."""

    def check(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise KitError(f"{where} is {shown(value)}, not a number from {low:g} to {high:g}")

    return check


def one_of(*words: str) -> Check:
    """One of some words."""

    def check(value: Any, where: str) -> None:
        if value not in words:
            raise KitError(f"{where} is {shown(value)}; known are {', '.join(words)}")

    return check


def null_or(check: Check) -> Check:
    """Null, or what another check lets through."""
    return lambda value, where: None if value is None else check(value, where)
