"""Decision files: CSV files that state which rows a training takes.

    place,selected,score,…further numbers…,source,prompt,completion[,reason]

`place` is the absolute place of a row, such as `/data/pool.jsonl:17`. `selected` is `yes` or `no`; a training leaves
out the rows with `no`. `scores.csv` and `dropped.csv` of `siftune sift`, the list of `siftune rows --csv`, and the file
that a report page saves are such files. Spreadsheets rewrite values, so true, false, 1 and 0 in any case are also read.

A file of places alone leaves out all of them: a text file with a place per line, or a CSV file without `selected`.
"""

import csv
import io
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from siftune.base.errors import DataError
from siftune.base.text import counted, file_named, file_of, inert, one_line, path_and_split
from siftune.data.rows import Row, row_texts, text_of

PLACE, SELECTED, SCORE = "place", "selected", "score"  # columns
DIGITS = 5  # decimals of the numbers in a file
_TEXTS = ("source", "prompt", "completion")
_VALUES = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
_SHOWN_PLACES = 3  # in a message
_WIDEST = 2**31 - 1  # characters of a field

logger = logging.getLogger(__name__)


class Decision(NamedTuple):
    """A line of a decision file.

    Attributes:
        place: Place of the row; it is written as an absolute one.
        selected: Whether a training takes the row.
        numbers: Its score, and further numbers; NaN for a missing one.
        source: Its source, as in reports.
        prompt: Its prompt.
        completion: Its completion.
        reason: The reason for the decision, if the file has that column.
    """

    place: str
    selected: bool
    numbers: Sequence[float]
    source: str
    prompt: str
    completion: str
    reason: str = ""


def decisions_csv(decisions: Iterable[Decision], numbers: Sequence[str] = (SCORE,), with_reason: bool = False) -> str:
    """The text of a decision file.

    A text that begins like a formula gets an apostrophe in front, so that no spreadsheet computes what is in a row.

    Args:
        decisions: The lines.
        numbers: Names of the columns of numbers.
        with_reason: Whether the file has the column `reason`.

    Example:
        >>> print(decisions_csv([Decision("no.jsonl:3", False, [2.5, math.nan], "sums", "=1+1", "3")], ["score", "s"]))
        place,selected,score,s,source,prompt,completion
        no.jsonl:3,no,2.50000,,sums,'=1+1,3
        <BLANKLINE>
    """
    box = io.StringIO()
    writer = csv.writer(box, lineterminator="\n")
    writer.writerow([PLACE, SELECTED, *numbers, *_TEXTS, *(["reason"] if with_reason else [])])
    for one in decisions:
        values = ["" if math.isnan(value) else f"{value:.{DIGITS}f}" for value in one.numbers]
        texts = (one.source, one.prompt, one.completion, *([one.reason] if with_reason else []))
        writer.writerow([absolute_place(one.place), "yes" if one.selected else "no", *values, *map(inert, texts)])
    return box.getvalue()


def is_selected(value: str) -> bool:
    """Read a value of the column `selected`.

    Raises:
        ValueError: It is neither yes nor no.

    Example:
        >>> is_selected("yes"), is_selected("FALSE"), is_selected("1")
        (True, False, True)
    """
    selected = _VALUES.get(value.strip().lower())
    if selected is None:
        raise ValueError(f"{SELECTED} is {one_line(value, 40)!r}, but must be yes or no")
    return selected


def holds(field: str, text: str) -> bool:
    """Whether the field of a decision file holds a text, or its start with an ellipsis, whatever the white space.

    Example:
        >>> holds("2 + 3", "2 + 2"), holds("'=2 +  2…", "=2 + 2, or 4")
        (False, True)
    """
    own, whole = " ".join(field.split()), " ".join(inert(text).split())
    return whole == own or (own.endswith("…") and whole.startswith(own[:-1].rstrip()))


class Decisions(NamedTuple):
    """Decisions from a file.

    Attributes:
        path: The file, for messages.
        selected: Whether a training takes a row, by the row's absolute place.
        for_copies: Whether the decision for a row also holds for its copies; not for a file of places alone.
        texts: Prompt and completion of rows, by their places, if the file has both columns.
        with_scores: Whether the file has scores, which siftune computes from losses of the rows.
    """

    path: str
    selected: dict[str, bool]
    for_copies: bool
    texts: Mapping[str, tuple[str, str]] = {}
    with_scores: bool = False


def read_decisions(path: str, moved: Sequence[str] = ()) -> Decisions:
    r"""Read a decision file, or a file of places alone, in which lines that begin with # are comments.

    Args:
        path: The file.
        moved: Files of rows, which stand for those of the same name in places that are gone, as after a project was
            moved.

    Raises:
        DataError: The file can't be read; it is one of places alone, and has none; a value of the column `selected` is
            neither yes nor no; or two lines decide differently on a row.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "scores.csv"
        >>> _ = file.write_text("place,selected\n/data/pool.jsonl:17,no\n/data/pool.jsonl:18,yes\n")
        >>> read_decisions(str(file)).selected
        {'/data/pool.jsonl:17': False, '/data/pool.jsonl:18': True}
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is invalid; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give the path of a file that names rows") from None
    first, _, _ = text.partition("\n")
    if Path(path).suffix.lower() == ".csv" or {PLACE, SELECTED} <= {*first.strip().split(",")}:
        columns, rows = csv_lines(path, text, (PLACE,), "save it with that column, and with commas between the columns")
        lines = [_decision(path, dict(zip(columns, fields, strict=True))) for _, fields in rows]
    else:
        places = (line.strip() for line in text.split("\n"))
        lines, columns = [_Line(place, False) for place in places if place and not place.startswith("#")], []
    for_copies = SELECTED in columns
    if not lines and not for_copies:
        raise DataError(f"{path} names no rows, so there is nothing to leave out; train without it")
    selected: dict[str, bool] = {}
    texts: dict[str, tuple[str, str]] = {}
    is_there = cache(lambda source: os.path.exists(os.path.expanduser(path_and_split(source)[0])))
    for line in lines:
        source = file_of(line.place)
        named = (not is_there(source) and file_named(source, moved)) or source
        place = absolute_place(named + line.place.removeprefix(source))
        if selected.setdefault(place, line.selected) != line.selected:
            raise DataError(f"{path} names {line.place} twice, once with yes and once with no: remove one of the lines")
        if line.texts is not None:
            texts[place] = line.texts
    return Decisions(path, selected, for_copies, texts, SCORE in columns)


class _Line(NamedTuple):
    place: str
    selected: bool
    texts: tuple[str, str] | None = None


def csv_lines(
    path: str | Path, text: str, required: Sequence[str], advice: str
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The columns of a CSV file, and its lines: the number of each, and its fields in the order of the columns.

    Empty lines are left out, as spreadsheets write them.

    Args:
        path: The file, for messages.
        text: Its text.
        required: Columns that it must have.
        advice: What to do if one is missing, for the message.

    Raises:
        DataError: It lacks a column, or a line has another number of fields.
    """
    before = csv.field_size_limit(_WIDEST)  # fields hold texts of rows
    try:
        reader = csv.reader(io.StringIO(text, newline=""))
        columns = [name.strip().lower() for name in next(reader, [])]
        if missing := [name for name in required if name not in columns]:
            raise DataError(
                f"{path} has no column {missing[0]!r} in its first line ({', '.join(columns) or 'nothing'}); {advice}"
            )
        lines = []
        for fields in reader:
            if not any(fields):
                continue
            if len(fields) != len(columns):
                found = f"{counted(len(fields), 'field')} under {counted(len(columns), 'column')}"
                raise DataError(f"{path}:{reader.line_num} has {found}: correct the line")
            lines.append((reader.line_num, fields))
        return columns, lines
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV ({error}): write it again") from error
    finally:
        csv.field_size_limit(before)


def _decision(path: str, fields: Mapping[str, str]) -> _Line:
    place = fields[PLACE].strip()
    try:
        selected = SELECTED in fields and is_selected(fields[SELECTED])
    except ValueError as error:
        raise DataError(f"{path}: {error}, for {place}") from None
    texts = (fields["prompt"], fields["completion"]) if {"prompt", "completion"} <= fields.keys() else None
    return _Line(place, selected, texts)


def remaining_rows(decisions: Decisions, rows: Sequence[Row], target: Sequence[Row] = ()) -> list[Row]:
    """Leave out the rows that decisions exclude.

    A row that a decision file does not name follows named rows with the same text: it is left out if all of these are.
    Sifting gives no score to copies. Other unnamed rows stay, as do rows of the target: only their own place excludes
    them, since sifting also leaves out rows of the pool that are in the target.

    Args:
        decisions: The decisions.
        rows: The training rows without the target's.
        target: Rows of the target.

    Returns:
        The remaining rows of both, in their order.

    Raises:
        DataError: A place has no row, or one with another text; or no row remains.

    Example:
        >>> from siftune.data.rows import rows_from
        >>> rows = rows_from([{"text": "one"}, {"text": "two"}, {"text": "one"}], name="rows.jsonl row")
        >>> one = Decisions("scores.csv", {"rows.jsonl row 1": False}, for_copies=True)
        >>> [row.completion for row in remaining_rows(one, rows)]
        ['two']
    """
    path, every = decisions.path, [*rows, *target]
    places = [absolute_place(row.origin) for row in every]
    own = {*places}
    if missing := [place for place in decisions.selected if place not in own]:
        shown = ", ".join(map(one_line, missing[:_SHOWN_PLACES])) + (", …" if len(missing) > _SHOWN_PLACES else "")
        first = f"the first training row is at {every[0].origin}" if every else "no training row can be used"
        raise DataError(f"{path} names {counted(len(missing), 'place')} without a training row ({shown}); {first}")
    _refuse_changed(decisions, dict(zip(places, every, strict=True)))
    named = [decisions.selected.get(place) for place in places]  # None: the file does not name the row
    decided = [*_with_copies(rows, named[: len(rows)]), *named[len(rows) :]] if decisions.for_copies else named
    remaining = [row for row, selected in zip(every, decided, strict=True) if selected is not False]
    if not remaining:
        raise DataError(f"{path} leaves out all training rows; leave some in")
    count = len(every) - len(remaining)
    if not count:
        logger.info("%s excludes no row: all %s stay", path, counted(len(every), "row"))
        return remaining
    copies = count - named.count(False)
    copied = f", {copies:,} of them copies of rows that it names" if copies else ""
    unnamed = decided[: len(rows)].count(None) if decisions.for_copies else 0
    others = f"; {counted(unnamed, 'row')} that it does not name stay{'s' if unnamed == 1 else ''}" if unnamed else ""
    logger.info("%s: leaving out %s%s%s", path, counted(count, "row"), copied, others)
    return remaining


def _refuse_changed(decisions: Decisions, rows: Mapping[str, Row]) -> None:
    """Refuse decisions on rows whose places have moved, since other rows would be left out.

    Of a row with a prompt, prompt and completion must be others: people correct answers, and spreadsheets change some
    fields, such as dates.
    """
    changed = []
    for place, (prompt, completion) in decisions.texts.items():
        text = text_of(rows[place])
        if not holds(completion, text.completion) and not (text.prompt and holds(prompt, text.prompt)):
            changed.append(rows[place].origin)
    if changed:
        verb = "has" if len(changed) == 1 else "have"
        raise DataError(
            f"{counted(len(changed), 'row')} of {decisions.path}, the first of them {changed[0]}, {verb} another "
            "text in the training rows: their file was changed since; restore it, or make the list again"
        )


def _with_copies(rows: Sequence[Row], named: Sequence[bool | None]) -> list[bool | None]:
    """The decisions for rows, with those for copies of named rows."""
    of_text: dict[bytes, bool] = {}
    texts = [*row_texts(rows)]
    for text, selected in zip(texts, named, strict=True):
        if selected is not None:
            of_text[text] = selected or of_text.get(text, False)
    pairs = zip(texts, named, strict=True)
    return [of_text.get(text) if selected is None else selected for text, selected in pairs]


def absolute_place(place: str) -> str:
    """Name a place by the absolute path of its file: the same row may be named from another folder."""
    match = re.fullmatch(r"(.+?)((?::| row )\d+)", place)
    return place if match is None else f"{_absolute_source(match[1], Path.cwd())}{match[2]}"


@cache
def _absolute_source(source: str, folder: Path) -> str:
    """Absolute path of a file relative to a folder; other sources unchanged."""
    name, split = path_and_split(source)
    file = folder / os.path.expanduser(name)
    return f"{file.resolve()}{split}" if os.path.exists(file) else source  # False for a name that no file can have
