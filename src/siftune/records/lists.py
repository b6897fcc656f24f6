"""Lists of training rows to leave out."""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from siftune.base.errors import DataError
from siftune.base.words import counted
from siftune.data.rows import Row

PLACE = "place"  # column
_SHOWN = 3  # places in a message
_WIDEST = 2**31 - 1  # characters of a field


def named_rows(path: str) -> list[str]:
    """Read places of rows: one a line, but for empty ones and those that begin with #; or the column of a CSV file.

    Raises:
        DataError: The file can't be read, or names no rows.
    """
    if Path(path).suffix.lower() == ".csv":
        places = [place for _, place, _ in _csv(path, PLACE)]
    else:
        lines = (line.strip() for line in _text(path).split("\n"))
        places = [line for line in lines if line and not line.startswith("#")]
    if not places:
        raise DataError(f"{path} names no rows; give places such as rows.jsonl:17, one a line.")
    return places


def without(rows: Sequence[Row], places: Iterable[str], path: str) -> list[Row]:
    """Leave out the rows that stand in some places.

    Args:
        rows: The rows.
        places: The places.
        path: The file that names them, for messages.

    Raises:
        DataError: There is no such row, or none would be left.

    Example:
        >>> from siftune.data.rows import rows_from
        >>> few = rows_from([{"text": "one"}, {"text": "two"}], name="rows.jsonl")
        >>> [row.completion for row in without(few, ["rows.jsonl 1"], "bad.txt")]
        ['two']
    """
    gone = _found(rows, places, path)
    left = [row for row in rows if _same(row.origin) not in gone]
    if not left:
        raise DataError(f"{path} names all training rows, so that none is left; leave some in.")
    return left


def _found(rows: Sequence[Row], places: Iterable[str], path: str) -> set[str]:
    """The places in the spelling that tells whether they are the same, all of which must be rows'."""
    own = {_same(row.origin) for row in rows}
    missing = [place for place in places if _same(place) not in own]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        raise DataError(
            f"{path} names {counted(len(missing), 'place')} where no training row stands ({shown}); the first training "
            f"row stands at {rows[0].origin}."
        )
    return {_same(place) for place in places}


def _same(place: str) -> str:
    """A place, its file as an absolute path: the same row may be named from another folder."""
    match = re.fullmatch(r"(.+?)((?::| row )\d+)", place)
    if match is None:
        return place
    return f"{_absolute(match[1], Path.cwd())}{match[2]}"


@cache
def _absolute(source: str, folder: Path) -> str:
    """The one full path of a file, seen from a folder; other sources as they are."""
    file = folder / Path(source).expanduser()
    return str(file.resolve()) if file.exists() else source


def _csv(path: str, *columns: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Lines of a CSV file: where each stands, its place, and its fields."""
    reader = csv.DictReader(io.StringIO(_text(path)))
    with _wide_fields():
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            columns_found = ", ".join(reader.fieldnames or ()) or "nothing"
            raise DataError(f"{path} has no column {missing[0]!r} in its first line (found: {columns_found}).")
        found = [(f"{path}:{reader.line_num}", (fields[PLACE] or "").strip(), fields) for fields in reader]
    yield from found


@contextmanager
def _wide_fields() -> Iterator[None]:
    """Let texts in a CSV file be as long as those of rows are."""
    before = csv.field_size_limit(_WIDEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is invalid; save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give the path of a file that names rows.") from None
