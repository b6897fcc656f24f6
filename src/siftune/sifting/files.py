"""Files of a sifted pool: decision files, and the selected rows as they are in the pool."""

import io
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from siftune.base.errors import DataError
from siftune.base.files import hash_of, keep_edited
from siftune.data.decisions import Decision, decisions_csv
from siftune.data.read import placed_records
from siftune.data.rows import Row, parse_rows, row_texts, text_of
from siftune.data.target import source_or_file
from siftune.recipe.schema import Recipe, train_files
from siftune.sifting.choose import Floats
from siftune.sifting.pool import compared
from siftune.sifting.work import Work

DROPPED, SIFTED = "dropped.csv", "sifted.jsonl"
_SHOWN = 300  # characters of a text in a decision file


def replace_scores(
    work: Work,
    name: str,
    rows: Sequence[Row],
    selected_R: NDArray[np.bool_],
    columns: Mapping[str, Floats],
    unscored: Sequence[Row],
) -> None:
    """Write a decision file as `write_scores`; an earlier one that somebody has edited since is renamed."""
    path, digests = work.folder.path / name, work.folder.state.get("digests", {})
    keep_edited(path, digests.get(name))
    write_scores(work, name, rows, selected_R, columns, unscored)
    work.folder.set_state(digests={**digests, name: hash_of(path)})


def write_scores(
    work: Work,
    name: str,
    rows: Sequence[Row],
    selected_R: NDArray[np.bool_],
    columns: Mapping[str, Floats],
    unscored: Sequence[Row] = (),
) -> None:
    """Write rows as a decision file, in which long texts are cut.

    Args:
        work: The sifting.
        name: The file.
        rows: Rows with numbers.
        selected_R: Whether each is selected.
        columns: Their numbers, each (R,).
        unscored: Rows without numbers that are not selected.
    """
    every, without = [*rows, *unscored], np.full(len(unscored), np.nan)
    selected = [*selected_R.tolist(), *[False] * len(unscored)]
    numbers = zip(*(np.append(values, without) for values in columns.values()), strict=True)
    lines = []
    for row, is_selected, own, source in zip(every, selected, numbers, source_or_file(every), strict=True):
        texts = (text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…" for text in (source, *text_of(row)))
        lines.append(Decision(row.origin, is_selected, own, *texts))
    work.folder.write(name, decisions_csv(lines, [*columns]))


def write_dropped(
    work: Work, pool: Sequence[Row], selected_R: NDArray[np.bool_], columns: Mapping[str, Floats]
) -> None:
    """Write the rows that were not selected: also those without a score, copies, and target or bad rows in the pool.

    A selected row with copies is also in the file, since a row that a decision file does not name follows its copies.
    """
    scored, copied = {row.origin for row in pool}, {*row_texts(compared(work.recipe, work.rows.copies))}
    learned = (row for row in work.rows.pool if not work.recipe.completion_only or row.last_answer() is not row)
    gone = [*work.rows.left_out, *(row for row in learned if row.origin not in scored)]  # of cut rows, another part
    listed = [at for at, text in enumerate(row_texts(pool)) if not selected_R[at] or text in copied]
    if listed or gone:
        own = {name: values[listed] for name, values in columns.items()}
        write_scores(work, DROPPED, [pool[at] for at in listed], selected_R[listed], own, gone)
    else:
        (work.folder.path / DROPPED).unlink(missing_ok=True)


@contextmanager
def copied_records(recipe: Recipe, pool: Sequence[Row], folder: Path) -> Iterator[IO[str]]:
    """Copy the records of a pool, which may change while it is sifted, to a file without a name in a folder.

    Args:
        recipe: The recipe of the sifting.
        pool: The rows of the pool that were read.
        folder: The folder.

    Yields:
        The file: two lines of JSON for each record, its place and the record.

    Raises:
        DataError: A row has changed since it was read.
    """

    def copied(name: str) -> Iterator[tuple[str, Any]]:
        for place, record in placed_records(name, "train", recipe.limit):
            file.write(f"{json.dumps(place)}\n{json.dumps(record, default=str)}\n")
            yield place, record

    texts = _by_place(pool)
    with TemporaryFile("w+", encoding="utf-8", dir=folder) as file:
        for name in train_files(recipe):
            for place, text in _by_place(parse_rows(copied(name), recipe.columns, bad=[])).items():
                if texts.get(place) == text:
                    del texts[place]
        if texts:
            raise DataError(f"{next(iter(texts))} has changed since it was read: run the command again")
        yield file


def _by_place(rows: Sequence[Row]) -> dict[str, bytes]:
    return dict(zip((row.origin for row in rows), row_texts(rows), strict=True))


def write_selected(work: Work, places: Container[str]) -> list[int]:
    """Write the selected rows as they were in the pool's files; returns their numbers among all rows of these."""
    text, numbers = io.StringIO(), list[int]()
    assert work.records is not None
    work.records.seek(0)
    for number, place in enumerate(work.records):
        record = next(work.records)
        if json.loads(place) in places:
            text.write(record)
            numbers.append(number)
    work.folder.write(SIFTED, text.getvalue())
    return numbers
