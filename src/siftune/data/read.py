"""Read rows from JSONL, JSON, CSV, text and Parquet files and from the hub, and chat templates from files.

JSONL, JSON, CSV and text are read by our own strict readers, so that every error names the file and the line.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from siftune.base.errors import DataError, RecipeError
from siftune.base.text import counted, one_line, path_and_split
from siftune.data.read_sets import UNREADABLE, is_saved, read_saved, read_set, unreadable
from siftune.data.rows import Row, no_garbage, parse_rows
from siftune.data.turns import kind_of

logger = logging.getLogger(__name__)

_PLACES = 3  # of rows with the same fault
_LONGEST = 2**18  # characters of a chat template
_PLACE = re.compile(r"(.*?(?::\d+| row \d+)): ")

Records = Iterator[tuple[str, Any]]  # origin; the record, or a DataError if it cannot be read


def load_rows(
    source: str,
    split: str = "train",
    limit: int | None = None,
    columns: Sequence[str] = (),
    bad: list[DataError] | None = None,
    questions: bool = False,
) -> list[Row]:
    """Read the rows of a file or a hub data set. Turns of the user without an answer are counted in a warning.

    Args:
        source: path of a `.jsonl`, `.ndjson`, `.json`, `.csv`, `.parquet` or `.txt` file, or of a folder of
            `save_to_disk`; otherwise a hub id or a local data set folder, optionally with a configuration and a split:
            `openai/gsm8k:main@test`.
        split: split of a data set whose name has none; ignored for a file.
        limit: largest number of rows to read; None reads all.
        columns: other names of columns, in pairs such as `prompt=question`.
        bad: list for the errors of bad rows, which are then left out; there may be no other rows.
        questions: read prompts to answer, as `rows.parse_question`; rows need no completions.

    Returns:
        The rows in the order of the source, at least one.

    Raises:
        DataError: the source cannot be found or read, holds no rows, or a row is wrong.
        RecipeError: a pair in `columns` is wrong.
    """
    if limit is not None and limit < 1:
        raise DataError(f"the limit on rows is {limit}; give at least 1, or leave it out to read all rows")
    with no_garbage():
        rows = parse_rows(islice(_open(source, split), limit), columns, bad, questions)
    if not rows and not bad:
        raise DataError(f"{source} is empty: no rows found; give a file with at least one row")
    logger.info("%s: %s", source, counted(len(rows), "row"))
    if unanswered := sum(row.unanswered > 0 for row in rows):
        logger.warning(
            "%s: %d of %d rows end with a turn of the user, which has no answer and is left out",
            *(source, unanswered, len(rows)),
        )
    return rows


def placed_records(source: str, split: str = "train", limit: int | None = None) -> Records:
    """Read the records of a file or hub data set as they are, with the places that `load_rows` gives them.

    Args:
        source: As for `load_rows`.
        split: As for `load_rows`.
        limit: Largest number of records to read; None reads all.

    Yields:
        The place, and the record, or a `DataError` if it cannot be read.

    Raises:
        DataError: The source cannot be found.
    """
    yield from islice(_open(source, split), limit)


def _open(source: str, split: str) -> Records:
    """Choose the reader by the name's ending, and the hub if there is no file."""
    check_source(source)
    name, own = path_and_split(source)
    path = Path(name).expanduser()
    if own and path.is_file():
        raise DataError(f"{source}: a file has no splits; leave out {own}")
    if path.is_file():
        return _reporting(_READERS[path.suffix.lower()](path, source), source)
    split = own.removeprefix("@") or split
    if is_saved(path):
        return read_saved(path, name, split)
    if path.exists():
        return read_set(name, split, _READERS)
    name, at, own = source.rpartition("@")
    return read_set(name, own, _READERS) if at else read_set(source, split, _READERS)


def check_source(source: str) -> None:
    """Refuse a file that does not exist or has an unknown ending, and a folder of mixed files, without reading them.

    Raises:
        DataError: The message names the file.
    """
    path = Path(path_and_split(source)[0]).expanduser()
    is_data = path.suffix.lower() in _READERS
    if path.is_dir() and len(first := _kinds_in(path)) > 1:  # `datasets` would read one kind and ignore the others
        *others, last = first.values()
        raise DataError(f"{source} has files of several kinds, such as {', '.join(others)} and {last}; name the files")
    if path.is_file() and not is_data:
        raise DataError(f"{source}: the ending {path.suffix!r} is unknown; supported: {', '.join(_READERS)}")
    if not path.is_file() and (is_data or (not path.exists() and source.startswith((".", "/", "~")))):
        state = "is a folder, not a file" if path.exists() else "does not exist"
        hint = "put spaces between files, not commas" if "," in source else "give the path of a data file"
        raise DataError(f"{source} {state}; {hint}")


_OTHERS = (".tsv", ".gz", ".bz2", ".xz", ".zst", ".zip")  # what `datasets` also reads in a folder


def _kinds_in(folder: Path) -> dict[str, str]:
    """Kinds of data files in a folder, with the name of the first file of each.

    A data set of `save_to_disk` or with a card has files of its own that are no rows: none are named.
    """
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json", "README.md")):
        return {}
    endings = {*_READERS, *_OTHERS}
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in endings and path.is_file()]
    kinds = {".jsonl": "JSON", ".ndjson": "JSON", ".json": "JSON"}
    found: dict[str, str] = {}
    for path in files:
        suffix = path.suffix.lower()
        found.setdefault(kinds.get(suffix, suffix), path.relative_to(folder).as_posix())
    return found


def check_columns(source: str, columns: Sequence[str] = ()) -> None:
    """Refuse a file of JSON lines or CSV of which no row can be used, such as one with other columns.

    Only the first row is read, unless it cannot be used.

    Raises:
        DataError: The message has the number of rows, and a fault with its places.
        RecipeError: A pair in `columns` is wrong.
    """
    if Path(source).suffix.lower() not in _LINES:
        return
    bad: list[DataError] = []
    parse_rows(islice(_open(source, ""), 1), columns, bad)
    if not bad or parse_rows(_open(source, ""), columns, bad := []):
        return
    raise DataError(f"none of the {counted(len(bad), 'row')} of {source} can be used: {grouped([*map(str, bad)])[0]}")


def grouped(bad: Sequence[str]) -> list[str]:
    """Faults of rows, each with its first three places and the number of further rows with the same fault.

    Example:
        >>> grouped([f"a.jsonl:{line}: it is empty" for line in range(1, 6)])
        ['a.jsonl:1, a.jsonl:2, a.jsonl:3 and 2 more: it is empty']
    """
    places: dict[str, list[str]] = {}
    for line in bad:
        found = _PLACE.match(line)
        places.setdefault(line[found.end() :] if found else line, []).append(found[1] if found else "")
    lines = []
    for fault, rows in places.items():
        more = f" and {len(rows) - _PLACES:,} more" if len(rows) > _PLACES else ""
        lines.append(f"{', '.join(rows[:_PLACES])}{more}: {fault}" if rows[0] else fault)
    return lines


def _reporting(records: Records, source: str) -> Records:
    """Pass on records; turn errors of the disk or of permissions into one sentence."""
    try:
        yield from records
    except OSError as error:
        reason = one_line(error.strerror or str(error))
        raise DataError(f"{source} cannot be read: {reason}; check the path and its permissions") from error


def _read_jsonl(path: Path, source: str) -> Records:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = _decode(line, source, number)
                record = _parse_json(text.rstrip(), source, number) if text.strip() else None
            except DataError as error:  # the next line can be read
                text, record = "?", error
            if text.strip():
                yield f"{source}:{number}", record


def _read_text(path: Path, source: str) -> Records:
    """Read the lines of a text, without those that are blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            origin = f"{source}:{number}"
            try:
                text = _decode(line, source, number).rstrip("\r\n")
            except DataError as error:
                yield origin, error
            else:
                if text.strip():
                    yield origin, {"text": text}


def _read_json(path: Path, source: str) -> Records:
    text = _decode(path.read_bytes(), source)
    try:
        content = _parse_json(text, source) if text.strip() else []
    except DataError as error:
        if not _is_object(text.partition("\n")[0]):
            raise
        raise DataError(f"{source} has one object per line: name it .jsonl, and not .json") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError(
            f"{source}: found {kind_of(content)}, but a .json file must hold a list of objects or "
            '{"data": [...]}; with one object per line, name it .jsonl'
        )
    yield from ((f"{source} row {number}", record) for number, record in enumerate(content, 1))


def _is_object(line: str) -> bool:
    """Whether a line is a complete JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(path: Path, source: str) -> Records:
    text = _decode(path.read_bytes(), source)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = _of_any_length(reader, len(text))
    end = 0  # a quoted field may span lines: name the line where the row starts
    try:
        header = [name.strip() for name in next(rows, [])]
        end = reader.line_num
        for name, character in (("tabs", "\t"), ("semicolons", ";")):
            if len(header) == 1 and character in header[0]:
                raise DataError(f"{source}:1: {name} separate the fields; save the file with commas, or as JSONL")
        twice = [name for name, count in Counter(header).items() if name and count > 1]
        if twice:
            raise DataError(f"{source}:1: the column {one_line(twice[0])!r} comes twice; rename one, or remove it")
        for fields in rows:
            origin, end = f"{source}:{end + 1}", reader.line_num
            if fields and len(fields) != len(header):
                yield (
                    origin,
                    DataError(
                        f"{origin}: the row has {counted(len(fields), 'field')}, but the header has {len(header)}; "
                        "put fields that hold commas or line breaks in double quotes"
                    ),
                )
            elif fields:
                yield origin, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{source}:{end + 1}: invalid CSV ({error}); mend the row or save as JSONL") from error


def _of_any_length(reader: Iterator[list[str]], longest: int) -> Iterator[list[str]]:
    """Go through a CSV reader whose fields may be long; Python's limit, 131,072, is that of the whole process."""
    while True:
        limit = csv.field_size_limit(longest)
        try:
            fields = next(reader, None)
        finally:
            csv.field_size_limit(limit)
        if fields is None:
            return
        yield fields


def _read_parquet(path: Path, source: str) -> Records:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                try:
                    records = batch.to_pylist()
                except UNREADABLE:  # the other rows can be read
                    records = [_values(batch.slice(at, 1)) for at in range(len(batch))]
                for record in records:
                    number += 1
                    origin = f"{source} row {number}"
                    yield origin, unreadable(origin, record) if isinstance(record, Exception) else record
    except pyarrow.ArrowException as error:
        raise DataError(f"{source}: invalid Parquet ({one_line(str(error))}); write the file again") from error


def _values(row: Any) -> dict[str, Any] | Exception:
    """A row of a Parquet file, or the error if it has a value that Python has no equivalent for."""
    try:
        values: dict[str, Any] = row.to_pylist()[0]
        return values
    except UNREADABLE as error:
        return error


_LINES = (".jsonl", ".ndjson", ".csv")
_READERS: dict[str, Callable[[Path, str], Records]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _decode(data: bytes, source: str, line: int | None = None) -> str:
    """Decode UTF-8, with or without a byte order mark; `line` is its number if `data` is one line."""
    try:
        return data.decode("utf-8-sig" if line in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        at = line or before.count(b"\n") + 1
        column = len(before) - (before.rfind(b"\n") + 1) + 1
        raise DataError(
            f"{source}:{at}: invalid UTF-8, byte 0x{data[error.start]:02x} at position {column} of the line; "
            "save the file as UTF-8"
        ) from error


def _parse_json(text: str, source: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at, reason = line or error.lineno, f"{error.msg}, character {error.colno}"
        raise DataError(f"{source}:{at}: invalid JSON ({reason}); mend the line") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless nesting
        raise DataError(f"{source}:{line or 1}: invalid JSON ({error}); mend the line") from error


def read_template(path: Path) -> str:
    """Read a chat template from a text file.

    Raises:
        RecipeError: It cannot be read, is empty, or is too long.
    """
    try:
        with path.expanduser().open(encoding="utf-8-sig") as file:
            text = file.read(_LONGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"template {one_line(str(path))} cannot be read ({one_line(str(error))}); give auto, chat, none, or a text "
            "file with a chat template"
        ) from error
    if len(text) > _LONGEST:
        raise RecipeError(f"template {path} has more than {_LONGEST:,} characters: give a chat template")
    if not text.strip():
        raise RecipeError(f"template {path} is empty: give a chat template, or none to use none")
    return text
