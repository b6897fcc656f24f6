"""Rows of sifting: the pool, rows of the target, and bad rows.

Rows of the target, and bad rows, are left out of the training on them: their losses show what a correct, or a bad, row
of the pool would have. Of a small target, two trainings leave out one half each, so that all its rows are measured.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from siftune.base.errors import DataError, RecipeError
from siftune.base.text import counted
from siftune.data.rows import Row, row_texts
from siftune.data.tokens import Form, tokens_of
from siftune.recipe.schema import Recipe, train_files
from siftune.recipe.training_rows import Read, ReadOnce, read_rows
from siftune.train.prepare import refuse_read
from siftune.train.source import Source

LEAST = 8  # rows of a target, and bad rows (ours)
_SMALL = 64  # rows of a target; fewer are halved (ours)
PARTS = {"target": "support", "avoid": "avoid"}  # of `Read` and `Prepared`


@dataclass(frozen=True)
class Few:
    """Rows of the target, or bad rows.

    Attributes:
        name: "target" or "avoid".
        file: The file or hub id.
        rows: Without copies.
        unseen: For each training on them, the rows that it leaves out.
        copies: Rows with the text of an earlier one.
        in_pool: Rows of the pool with the text of one.
    """

    name: str
    file: str
    rows: list[Row]
    unseen: list[list[Row]]
    copies: list[Row]
    in_pool: list[Row]

    @property
    def title(self) -> str:
        """The rows in a message."""
        return "the target" if self.name == "target" else "the bad rows"


@dataclass(frozen=True)
class Rows:
    """All rows.

    Attributes:
        pool: Without the rows of `few` and without copies.
        few: The target, the bad rows, or both.
        copies: Rows of the pool with the text of an earlier one.
        bad: Faults of unusable rows.
    """

    pool: list[Row]
    few: list[Few]
    copies: list[Row]
    bad: list[DataError]

    @property
    def left_out(self) -> list[Row]:
        """Rows of the files of the pool that have no score."""
        return [*self.copies, *(row for few in self.few for row in few.in_pool)]

    @property
    def bad_in_pool(self) -> list[Row]:
        """Those of them that are bad rows: no training should take them."""
        return [row for few in self.few if few.name == "avoid" for row in few.in_pool]

    def notes(self) -> list[str]:
        """Sentences on rows that are there twice."""
        counts = [
            (len(few.in_pool), ("is", "are"), f"of the pool {{}} in {few.title} too: left out") for few in self.few
        ]
        counts.append((len(self.copies), ("has", "have"), "of the pool {} the text of an earlier row: left out"))
        for few in self.few:
            text = f"of {few.title} {{}} the text of an earlier row: left out of sifting"
            counts.append((len(few.copies), ("has", "have"), text))
        return [f"{counted(count, 'row')} {text.format(verb[count > 1])}" for count, verb, text in counts if count]


def read_all(recipe: Recipe, avoid: str | None, source: Source, reader: ReadOnce) -> Rows:
    """Read the pool, the rows of the recipe's target, and bad rows.

    Raises:
        DataError: Rows cannot be used, are too few, or none is left in the pool.
    """
    pool = read_rows(recipe, reader)
    files = {name: file for name, file in (("target", recipe.target), ("avoid", avoid)) if file}
    alone = replace(recipe, target=None, limit=None, eval=None, eval_share=0.0)
    read = {name: read_rows(replace(alone, train=file), reader) for name, file in files.items()}
    bad = [fault for part in (pool, *read.values()) for fault in part.bad]
    parts = {"train": pool.parts["train"], **{PARTS[name]: part.parts["train"] for name, part in read.items()}}
    refuse_read(recipe, Read(parts, bad), source.tokenizer)
    few_rows = {name: part.parts["train"] for name, part in read.items()}
    if recipe.bad_rows == "drop":  # before some are held out: those must be usable
        form = Form(source.tokenizer(), recipe.max_length, recipe.template, recipe.completion_only)
        for name, rows in few_rows.items():
            if rows:
                tokens = tokens_of(compared(recipe, rows), form)
                few_rows[name] = tokens.usable(rows)
                bad += tokens.faults(rows)
    few = [_few(name, file, few_rows[name], pool.parts["train"]) for name, file in files.items()]
    _refuse_both(few)
    gone = {row.origin for each in few for row in each.in_pool}
    others = [row for row in pool.parts["train"] if row.origin not in gone]
    if not others:
        words = " or ".join(each.title for each in few)
        raise DataError(f"no row of {' '.join(train_files(recipe))} is outside of {words}: give other rows")
    different, copies = _without_copies(others)
    return Rows(list(different.values()), few, copies, bad)


def compared(recipe: Recipe, rows: Sequence[Row]) -> list[Row]:
    """Rows as their losses are compared: with a target, only the last answer of a conversation has labels."""
    return [row.last_answer() for row in rows] if recipe.target else [*rows]


def _few(name: str, file: str, rows: Sequence[Row], pool: Sequence[Row]) -> Few:
    own, copies = _without_copies(rows)
    different = list(own.values())
    if len(different) < LEAST:
        advice = {
            "target": f"a pool is sifted by at least {LEAST}: add correct rows of the task, or train without sifting",
            "avoid": f"--avoid needs at least {LEAST}: add answers that the model must not give, or leave it out",
        }
        found = f"{counted(len(different), 'row')} that can be used{' and differ' if copies else ''}"
        raise DataError(f"{file} has {found}, but {advice[name]}")
    in_pool = [row for row, text in zip(pool, row_texts(pool), strict=True) if text in own]
    if name == "target" and len(different) < _SMALL:
        mixed = sorted(own, key=lambda text: hashlib.sha256(text).digest())  # classes may alternate in the file
        halves = [{*mixed[start::2]} for start in (0, 1)]
        unseen = [[row for text, row in own.items() if text in half] for half in halves]
        return Few(name, file, different, unseen, copies, in_pool)
    numbers = np.linspace(0, len(different) - 1, held_out_count(len(different))).round()  # evenly: it may be sorted
    return Few(name, file, different, [[different[int(number)] for number in numbers]], copies, in_pool)


def held_out_count(rows: int) -> int:
    """Number of rows that a training leaves out: a fifth, at least 8, at most half (ours).

    Example:
        >>> [held_out_count(rows) for rows in (8, 16, 100)]
        [4, 8, 20]
    """
    return min(max(rows // 5, 8), rows // 2)


def _without_copies(rows: Sequence[Row]) -> tuple[dict[bytes, Row], list[Row]]:
    """The first row of each text, by its text, and the other rows."""
    own: dict[bytes, Row] = {}
    copies = [row for row, text in zip(rows, row_texts(rows), strict=True) if own.setdefault(text, row) is not row]
    return own, copies


def _refuse_both(few: Sequence[Few]) -> None:
    """Refuse a row that is both right and wrong."""
    texts = [dict(zip(row_texts(each.rows), each.rows, strict=True)) for each in few]
    both = [row for text, row in texts[-1].items() if text in texts[0]] if len(few) > 1 else []
    if both:
        raise DataError(f"{both[0].origin} is in {few[0].file} too: a row is either correct or bad, so leave one out")


def count_of(share: float | int | None, pool: int) -> int | None:
    """Number of rows to select; None if the target's rows determine it.

    Raises:
        RecipeError: The pool has fewer.
    """
    if isinstance(share, int) and share > pool:
        raise RecipeError(f"{share} rows are to be selected, but the pool has {pool}: give a smaller number")
    return max(1, round(share * pool)) if isinstance(share, float) else share
