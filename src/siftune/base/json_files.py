"""JSON files of work folders, run folders and caches, which a crash or a disk may have changed.

A file is read as UTF-8, and pydantic checks its form strictly.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from siftune.base.errors import InputError
from siftune.base.text import one_line

T = TypeVar("T")
_DIGEST = "sha256"  # key in an object
_ADVICE = "restore it, or delete it"


def read_json(path: Path, form: type[T], advice: str = _ADVICE) -> T:
    """Read a JSON file of a certain form.

    Args:
        path: The file.
        form: A type that pydantic can check: a model, a dataclass, or a type such as `dict[str, float]`. No value is
            converted, except for a whole number where the form has a float.
        advice: What to do if the file cannot be read, for the message.

    Raises:
        InputError: The file is missing or a folder; or it is not UTF-8, or not JSON of this form.

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
    try:
        return TypeAdapter(form).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), advice) from error
    except ValidationError as error:
        raise _unreadable(path, _fault_of(error), advice) from None


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
        raise _unreadable(path, _fault_of(error), advice) from None


def read_json_lines(path: Path, form: type[T], advice: str = _ADVICE) -> tuple[list[T], int]:
    r"""Read a file of JSON lines of a certain form.

    Args:
        path: The file.
        form: As for `read_json`.
        advice: As for `read_json`.

    Returns:
        The lines, and the number of damaged ones, which are left out: those of another form, and a last line without a
        line break, which a crash cut off. Nothing for a missing file.

    Raises:
        InputError: The system cannot read the file.

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
    try:
        with path.open("rb") as file:
            for line in file:
                complete = line.endswith(b"\n")
                try:
                    lines += [adapter.validate_json(line, strict=True)] if complete else []
                except ValidationError:
                    complete = False
                damaged += not complete
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), advice) from error
    return lines, damaged


def _fault_of(error: ValidationError) -> str:
    """The first fault that pydantic reports, with its place, on one line."""
    fault: Any = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, fault["loc"]))
    return one_line(f"{place}: {fault['msg']}" if place else fault["msg"])


def _unreadable(path: Path, why: str, advice: str) -> InputError:
    return InputError(f"{path} cannot be read ({why}); {advice}")
