"""Complete texts of the rows of a list, and its rows with another completion.

Decision files cut texts, and change those that a spreadsheet would compute. The rows themselves are in the files that
the places name. No data set is fetched from the hub.
"""

import json
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from siftune.base.errors import DataError, InputError
from siftune.base.text import counted, file_of, one_line, path_and_split
from siftune.data.decisions import holds
from siftune.data.read import placed_records
from siftune.data.rows import Row, Text, parse_rows, text_of
from siftune.report.scored import Scored

logger = logging.getLogger(__name__)


class Complete(NamedTuple):
    """A row as it is in its file.

    Attributes:
        text: Its text.
        around: The row as a line of JSON: the parts before and after its completion, a string in quotes. None if only
            its text can be read.
    """

    text: Text
    around: tuple[str, str] | None


def complete_rows(rows: Sequence[Scored], columns: Sequence[str] = ()) -> tuple[dict[str, Complete], list[str]]:
    """Read rows from the files that their places name.

    Args:
        rows: The rows.
        columns: Names of columns, as for `siftune.data.rows.parse_rows`.

    Returns:
        The rows by their places, without those that cannot be read or that have changed since they were listed; and a
        clause for each reason.
    """
    wanted: dict[str, dict[str, Scored]] = {}
    for row in rows:
        wanted.setdefault(file_of(row.place), {})[row.place] = row
    complete: dict[str, Complete] = {}
    reasons: list[str] = []
    for source, of_file in wanted.items():
        if not Path(path_and_split(source)[0]).expanduser().exists():
            reasons.append(f"{one_line(source)} is no file here")
            continue
        logger.info("%s: rows of the list", one_line(source))
        try:
            read = _read(source, of_file, columns)
        except InputError as error:
            reasons.append(f"{one_line(source)} cannot be read: {error}")
            continue
        complete |= read
        if changed := len(of_file) - len(read):
            verb = "has" if changed == 1 else "have"
            reasons.append(f"{counted(changed, 'row')} of {one_line(source)} {verb} changed, or cannot be read as text")
    return complete, reasons


def _read(file: str, wanted: Mapping[str, Scored], columns: Sequence[str]) -> dict[str, Complete]:
    """The rows of a file that are wanted, by their places, without those whose text is another one."""
    records = {}
    for number, (place, record) in enumerate(placed_records(file)):
        if number == 0 or place in wanted:  # the first row determines the format
            records[place] = record
    bad: list[DataError] = []
    complete = {}
    for row in parse_rows(records.items(), columns, bad):
        listed = wanted.get(row.origin)
        text = text_of(row)
        if listed and holds(listed.prompt, text.prompt) and holds(listed.completion, text.completion):
            complete[row.origin] = Complete(text, _around(records[row.origin], row, columns))
    return complete


def _around(record: dict[str, Any], row: Row, columns: Sequence[str]) -> tuple[str, str] | None:
    """JSON of a record before and after its completion; None if no string of it is the completion."""
    mark = secrets.token_hex(16)
    for keys in _completions(record, columns):
        changed = deepcopy(record)
        inner: Any = changed
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = mark
        if parse_rows([(row.origin, changed)], columns, []) == [replace(row, completion=mark)]:
            before, after = json.dumps(changed, default=str).split(f'"{mark}"')
            return before, after
    return None


def _completions(record: Mapping[str, Any], columns: Sequence[str]) -> Iterator[list[Any]]:
    """Where a record may have its completion, as keys from the outside to the string."""
    names = dict(pair.split("=", 1) for pair in columns if "=" in pair)
    for name in ("completion", "output", "messages", "conversations", "text"):
        column = names.get(name, name)
        value = record.get(column)
        if isinstance(value, str):
            yield [column]
        elif isinstance(value, list):  # the last answer: turns of the user may follow
            for at, turn in reversed([*enumerate(value)]):
                if isinstance(turn, dict):
                    yield from ([column, at, key] for key in ("content", "value") if isinstance(turn.get(key), str))
