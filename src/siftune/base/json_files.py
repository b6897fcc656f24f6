"""JSON files of work folders, run folders and caches, which a crash, a disk or another party may have changed.

A file is read up to a size, as UTF-8, and pydantic checks its form strictly. JSON that is nested more than 200 levels
deep is refused, and so are pipes, which would never end.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from siftune.base.errors import InputError
from siftune.base.text import one_line

T = TypeVar("T")
MOST = 2**26  # bytes of a file, or of a line
_DIGEST = "sha256"  # key in an object
_ADVICE = "restore it, or delete it"


def read_json(path: Path, form: type[T], advice: str = _ADVICE, most: int = MOST) -> T:
    """Read a JSON file of a certain form.

    Args:
        path: The file.
        form: A type that pydantic can check: a model, a dataclass, or a type such as `dict[str, float]`. No value is
            converted, except for a whole number where the form has a float.
        advice: What to do if the file cannot be read, for the message.
        most: Bytes, at most.

    Raises:
        InputError: The file is missing, a folder or a pipe; it is too large, not UTF-8, or not JSON of this form.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "numbers.json"
        >>> _ = path.write_text('{"one": 1, "two": [2]}')
        >>> try:
        ...     read_json(path, dict[str, int])
        ... except InputError as error:
        ...     print(str(error).replace(str(path), "numbers.json"))
        numbers.json cannot be read (two: Input should be a valid integer); restore it, or delete it
    """
    with _opened(path, advice) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise _unreadable(path, f"it has more than {most:,} bytes", advice)
    try:
        return TypeAdapter(form).validate_json(content, strict=True)
    except ValidationError as error:
        raise _unreadable(path, fault_of(error), advice) from None


def hash_of_json(value: Any) -> str:
    """SHA-256 in hexadecimal of a value as JSON; the order of keys counts."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a SHA-256 of its other values, by which `unsealed` notices damage, not malice.

    Example:
        >>> unsealed(sealed({"loss": 1.5}))
        {'loss': 1.5}
    """
    return {**content, _DIGEST: hash_of_json(content)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The values of a `sealed` object; None if they have changed."""
    values = {name: value for name, value in content.items() if name != _DIGEST}
    return values if sealed(values)[_DIGEST] == content.get(_DIGEST) else None


def read_sealed(path: Path, form: type[T], advice: str = _ADVICE) -> T:
    """Read a file with one `sealed` object; arguments and errors as for `read_json`, and values that were changed."""
    values = unsealed(read_json(path, dict[str, Any], advice))
    if values is None:
        raise _unreadable(path, "it is not what was written", advice)
    try:
        return TypeAdapter(form).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise _unreadable(path, fault_of(error), advice) from None


def read_json_lines(path: Path, form: type[T], advice: str = _ADVICE, most: int = MOST) -> tuple[list[T], int]:
    r"""Read a file of JSON lines of a certain form.

    Args:
        path: The file.
        form: As for `read_json`.
        advice: As for `read_json`.
        most: Bytes of a line, at most.

    Returns:
        The lines, and the number of damaged ones, which are left out: those that are too long or of another form, and a
        last line without a line break, which a crash cut off. Nothing for a missing file.

    Raises:
        InputError: The file is a folder or a pipe, or the system cannot read it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "losses.jsonl"
        >>> _ = path.write_text('{"loss": 1.5}\n{"loss": "?"}\n{"loss": 2.5}\n{"lo')
        >>> read_json_lines(path, dict[str, float])
        ([{'loss': 1.5}, {'loss': 2.5}], 2)
    """
    adapter, lines, damaged = TypeAdapter(form), list[T](), 0
    if not path.exists():
        return lines, damaged
    with _opened(path, advice) as file:
        while line := file.readline(most):
            complete = line.endswith(b"\n")
            try:
                lines += [adapter.validate_json(line, strict=True)] if complete else []
            except ValidationError:
                complete = False
            damaged += not complete
            while line and not line.endswith(b"\n"):  # the rest of a line that is too long
                line = file.readline(most)
    return lines, damaged


@contextmanager
def _opened(path: Path, advice: str) -> Iterator[BinaryIO]:
    """Open a file to read; no pipe, which would block."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _unreadable(path, "it is no file", advice)
            yield file
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), advice) from error


def fault_of(error: ValidationError) -> str:
    """The first fault that pydantic reports, with its place, on one line."""
    fault: Any = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, fault["loc"]))
    return one_line(f"{place}: {fault['msg']}" if place else fault["msg"])


def _unreadable(path: Path, why: str, advice: str) -> InputError:
    return InputError(f"{path} cannot be read ({why}); {advice}")
