"""Files of a sifted pool: decision files, and the selected rows as they are in the pool."""

import io
import json
from collections.abc import Container, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from siftune.data.read import placed_records
from siftune.data.rows import Row, row_texts
from siftune.data.target import source_or_file
from siftune.recipe.schema import train_files
from siftune.records.decisions import Decision, decisions_csv
from siftune.records.rows import text_of
from siftune.sifting.scores import Floats
from siftune.sifting.work import Work

DROPPED, SIFTED = "dropped.csv", "sifted.jsonl"
_SHOWN = 300  # characters of a text in a decision file


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
    """Write the rows that were not selected: those with scores, copies, and rows of the target or bad rows in the pool.

    A selected row with copies is also in the file, since a row that a decision file does not name follows its copies.
    """
    gone, copied = work.rows.left_out, {*row_texts(work.rows.copies)}
    listed = [at for at, text in enumerate(row_texts(pool)) if not selected_R[at] or text in copied]
    if listed or gone:
        own = {name: values[listed] for name, values in columns.items()}
        write_scores(work, DROPPED, [pool[at] for at in listed], selected_R[listed], own, gone)
    else:
        (work.folder.path / DROPPED).unlink(missing_ok=True)


def write_selected(work: Work, places: Container[str]) -> list[int]:
    """Write the selected rows as they are in the pool's files; returns their numbers among all rows of these."""
    recipe, text, numbers = work.recipe, io.StringIO(), list[int]()
    records = (pair for name in train_files(recipe) for pair in placed_records(name, "train", recipe.limit))
    for number, (place, record) in enumerate(records):
        if place in places:
            text.write(json.dumps(record, default=str) + "\n")
            numbers.append(number)
    work.folder.write(SIFTED, text.getvalue())
    return numbers
