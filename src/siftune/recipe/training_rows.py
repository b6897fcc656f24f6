"""Training rows of a recipe: reading and digests.

Rows that cannot be used are collected from all files and reported together. A command on a run folder reads the files
that its recipe names; the readers log their names.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from siftune.base.errors import DataError, RecipeError
from siftune.base.json_files import read_sealed
from siftune.base.text import counted, file_of, one_line, path_and_split
from siftune.data.decisions import absolute_place, read_decisions, remaining_rows
from siftune.data.read import load_rows
from siftune.data.rows import Row, row_texts
from siftune.data.target import held_out, with_target
from siftune.methods.options import OWN
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe, compared_with, train_files

DROP_ROWS = "drop_rows"  # name of the copy of a list of rows in a run folder, with the list's ending
BAD_ROWS = "bad_rows.txt"  # file of a run folder
_RECIPE, _ABOUT = "recipe.yaml", "run.json"  # files of a run folder


def digest_of(rows: Sequence[Row]) -> str:
    """Hash of the texts and weights of rows in their order, independent of their files."""
    digest = hashlib.sha256()
    for row, text in zip(rows, row_texts(rows), strict=True):
        digest.update(text if row.weight == 1 else text + repr(row.weight).encode())
    return digest.hexdigest()


class ReadOnce:
    """Reader of files, as `load_rows`, that reads each once: all uses then have the same rows, even of a changed file.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = file.write_text('{"text": "before"}')
        >>> load, bad = ReadOnce(), []
        >>> first, _ = load(str(file), "train", None, (), bad), file.write_text('{"text": "after"}')
        >>> [row.completion for row in load(str(file), "train", None, (), bad)]
        ['before']
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[Any, ...], tuple[list[Row], list[DataError]]] = {}

    def __call__(
        self, source: str, split: str, limit: int | None, columns: Sequence[str], bad: list[DataError]
    ) -> list[Row]:
        """Return the rows, and add the errors of bad ones to a list; arguments and errors as for `load_rows`."""
        key = (source, split, limit, *columns)
        if key not in self._rows:
            faults: list[DataError] = []
            self._rows[key] = load_rows(source, split, limit, columns, faults), faults
        rows, faults = self._rows[key]
        bad += faults
        return list(rows)


@dataclass(frozen=True)
class Read:
    """Rows as read."""

    parts: Mapping[str, Sequence[Row]]  # `train`, and optionally `eval`, `support` and `keep`
    bad: Sequence[DataError] = ()  # faults of rows that are left out


def read_rows(recipe: Recipe, reader: ReadOnce | None = None) -> Read:
    """Read the training rows of a recipe, including its target's, and held-out and support rows.

    Args:
        recipe: The recipe.
        reader: Reader that has read files before; None: read all files.

    Raises:
        DataError: A file cannot be read, or no rows remain to hold out or to train on.
        RecipeError: A private run has a list of rows with scores.
    """
    bad: list[DataError] = []
    reader = reader or ReadOnce()

    def load(name: str, split: str = "train", limit: int | None = None) -> list[Row]:
        return reader(name, split, limit, recipe.columns, bad)

    def weighted(rows: Sequence[Row]) -> Iterator[Row]:
        """Leave out rows with an invalid weight."""
        for row in rows:
            try:
                _ = row.weight
            except DataError as error:
                bad.append(error)
            else:
                yield row

    files = [list(weighted(load(name, limit=recipe.limit))) for name in train_files(recipe)]
    target = list(weighted(load(recipe.target))) if recipe.target else []
    if recipe.drop_rows is not None:
        moved = [*train_files(recipe), *([recipe.target] if recipe.target else [])]
        decisions = read_decisions(recipe.drop_rows, moved)
        every = [row for rows in files for row in rows]
        if recipe.dp_epsilon is not None and decisions.with_scores:
            raise RecipeError(
                f"the scores of {recipe.drop_rows} were computed from losses of rows, which no noise of dp_epsilon "
                "covers: leave drop_rows or dp_epsilon out"
            )
        remaining = {id(row) for row in remaining_rows(decisions, every, target)}
        *files, target = ([row for row in rows if id(row) in remaining] for rows in (*files, target))
    train: list[Row] = []
    heldout: list[Row] = []
    for rows in files:
        own, measured = held_out(rows, recipe.eval_share, target) if recipe.eval_share else (rows, [])
        train += own
        heldout += measured
    if recipe.eval_share and (not bad or recipe.bad_rows == "drop"):  # bad rows are reported instead
        for part, fault in ((heldout, "holds out none"), (train, "leaves none to train on")):
            if not part:
                raise DataError(
                    f"eval_share {recipe.eval_share:g} of {counted(len(train) + len(heldout), 'row')} {fault}; give "
                    "another share, or other rows with --eval FILE"
                )
    parts = {"train": with_target(train, target, recipe.target_share) if recipe.target else train}
    if recipe.eval or heldout:
        parts["eval"] = load(recipe.eval, "test") if recipe.eval else heldout
    if compared_with(recipe):
        parts["support"] = target
    if recipe.keep not in (None, OWN):
        parts["keep"] = load(recipe.keep)
    return Read(parts, bad)


def bad_row_lines(faults: Iterable[str]) -> Iterator[str]:
    """Lines of the file of bad rows: their faults, with complete paths, since files of two folders may share a name."""
    for fault in faults:
        place = re.match(r".*?(?::| row )\d+(?=: )", fault)
        yield fault if place is None else f"{absolute_place(place[0])}{fault[place.end() :]}"


def recipe_of_rows(run: Path) -> Recipe:
    """The recipe of a run folder for reading its training rows: without held-out rows and texts to keep.

    Its list of rows to leave out is the copy in the run folder, which may have been moved since.

    Raises:
        RecipeError: The recipe cannot be read.
    """
    recipe: Recipe = replace(load_recipe(run / _RECIPE), eval=None, keep=None)
    if recipe.drop_rows is None:
        return recipe
    copied = run / Path(recipe.drop_rows).name
    return replace(recipe, drop_rows=str(copied)) if copied.stem == DROP_ROWS and copied.is_file() else recipe


def used_rows(run: Path, recipe: Recipe) -> dict[str, list[Row]]:
    """Rows of a run, without those that it left out: `train`, and optionally `eval` and others, as in `Read`.

    Args:
        run: The run folder.
        recipe: Its recipe.

    Raises:
        DataError: A file is missing or cannot be read any more.
    """
    refuse_missing(run, [*train_files(recipe), *filter(None, (recipe.target, recipe.drop_rows))])
    path = run / BAD_ROWS
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({one_line(str(error))}): restore it, or train again") from error
    places = {line[: match.start()] for line in lines for match in re.finditer(": ", line)}  # a place may contain ": "
    bad = {*map(absolute_place, places)}
    moved = {Path(place).name for place in bad if not Path(path_and_split(file_of(place))[0]).exists()}
    return {
        part: [row for row in rows if absolute_place(row.origin) not in bad and Path(row.origin).name not in moved]
        for part, rows in read_rows(recipe).parts.items()
    }


def refuse_missing(run: Path, files: Sequence[str]) -> None:
    """Refuse files of a run's recipe that are missing.

    Raises:
        DataError: The message names the file and the recipe.
    """
    for file in files:
        path = Path(path_and_split(file)[0]).expanduser()
        if path.is_absolute() and not path.exists():
            raise DataError(
                f"{one_line(file)}, which {run / _RECIPE} names, does not exist: restore it, or correct its path there"
            )


class _About(BaseModel):
    """Facts of run.json on the training rows."""

    rows: str | None = None  # hash of their texts


def recorded_digest(run: Path) -> str | None:
    """Digest of the training rows of a run that has ended; None of a private run.

    Raises:
        InputError: The run has not ended, or its record is damaged.
    """
    return read_sealed(run / _ABOUT, _About, "train to the end first").rows


def refuse_changed(run: Path, rows: Sequence[Row]) -> None:
    """Refuse training rows other than a run has recorded; a private run, and one that has not ended, record none.

    Raises:
        DataError: The rows have changed.
        InputError: The record is damaged.
    """
    recorded = recorded_digest(run) if (run / _ABOUT).is_file() else None
    if recorded not in (None, digest_of(rows)):
        raise DataError(f"the training rows have changed since {run} was trained: restore them, or train again")
