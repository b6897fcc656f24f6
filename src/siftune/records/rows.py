"""Training rows of a recipe: reading, lists of rows to leave out, digests.

Rows that cannot be used are collected from all files and reported together.
"""

import csv
import hashlib
import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from siftune.base.errors import DataError
from siftune.base.words import counted
from siftune.data.read import load_rows
from siftune.data.rows import Row, said
from siftune.data.target import held_out, with_target
from siftune.recipe.schema import Recipe, compared_with, train_files

BAD_ROWS = "bad_rows.txt"  # file of a run folder
PLACE = "place"  # column
_SHOWN_PLACES = 3  # places in a message
_WIDEST = 2**31 - 1  # characters of a field

logger = logging.getLogger(__name__)


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
        shown = ", ".join(missing[:_SHOWN_PLACES]) + (", …" if len(missing) > _SHOWN_PLACES else "")
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


class Text(NamedTuple):
    """What a row says; turns of a conversation before the completion are in the prompt, with their roles."""

    prompt: str
    completion: str


def text_of(row: Row) -> Text:
    """What a row says.

    Example:
        >>> from siftune.data.rows import rows_from
        >>> text_of(rows_from([{"prompt": "2 + 2?", "completion": "4"}])[0])
        Text(prompt='2 + 2?', completion='4')
    """
    if len(row.prompt) == 1 and row.prompt[0].role == "user":
        return Text(row.prompt[0].content, row.completion)
    return Text("\n".join(f"{turn.role}: {turn.content}" for turn in row.prompt), row.completion)


def digest_of(rows: Sequence[Row]) -> str:
    """What tells rows from others, wherever they stand: a hash of what they say, in their order."""
    digest = hashlib.sha256()
    for each in said(rows):
        digest.update(each)
    return digest.hexdigest()


@dataclass(frozen=True)
class Read:
    """Rows as they were read."""

    parts: Mapping[str, Sequence[Row]]  # `train`; and `eval` and `support`, where there are any
    bad: Sequence[DataError] = ()  # what is wrong with rows that are left out of them


def read_rows(recipe: Recipe) -> Read:
    """Read the training rows, a target's rows among them, and held-out and support rows where there are any.

    Raises:
        DataError: A file cannot be read, or nothing is held out or left to train on.
    """
    bad: list[DataError] = []
    load = partial(load_rows, format=recipe.format, bad=bad)
    files = [list(_weighed(load(name, recipe.train_split, recipe.limit), bad)) for name in train_files(recipe)]
    target = list(_weighed(load(recipe.target, recipe.train_split, None), bad)) if recipe.target else []
    *files, target = _listed(recipe, [*files, target])
    parts: dict[str, Sequence[Row]] = {"train": [], "eval": []}
    for rows in files:
        kept, held = held_out(rows, recipe.eval_share, target) if recipe.eval_share else (rows, [])
        parts["train"] = [*parts["train"], *kept]
        parts["eval"] = [*parts["eval"], *held]
    if not bad or recipe.bad_rows == "drop":  # else these are told
        _check_share(recipe, parts)
    if recipe.eval:
        parts["eval"] = load(recipe.eval, recipe.eval_split, None)
    if recipe.target:
        parts["train"] = with_target(parts["train"], target, recipe.target_share)
    if compared_with(recipe):
        parts["support"] = target
    return Read({name: rows for name, rows in parts.items() if rows or name != "eval"}, bad)


def trained_rows(run: Path, recipe: Recipe) -> list[Row]:
    """The rows that the run in a folder has trained on: as its recipe has them, but for those that were left out.

    Raises:
        DataError: A file cannot be read any more.
    """
    return _used(run, recipe, "train")


def held_out_rows(run: Path, recipe: Recipe) -> list[Row]:
    """The rows that a run with `eval_share` has held out of its training rows; as `trained_rows`."""
    return _used(run, recipe, "eval")


def _used(run: Path, recipe: Recipe, part: str) -> list[Row]:
    """Rows of a part, but for those that could not be used."""
    path = run / BAD_ROWS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    places = {line[: found.start()] for line in lines for found in re.finditer(": ", line)}  # each begins with its own
    return [row for row in read_rows(recipe).parts[part] if row.origin not in places]


def _listed(recipe: Recipe, files: list[list[Row]]) -> list[list[Row]]:
    """Leave out the rows of each file that a recipe's list names."""
    if recipe.drop_rows is None:
        return files
    named = named_rows(recipe.drop_rows)
    logger.info("%s: %s to leave out", recipe.drop_rows, counted(len(set(named)), "row"))
    left = {id(row) for row in without([row for rows in files for row in rows], named, recipe.drop_rows)}
    return [[row for row in rows if id(row) in left] for rows in files]


def _weighed(rows: Sequence[Row], bad: list[DataError]) -> Iterator[Row]:
    """Leave out rows whose weight is none."""
    for row in rows:
        try:
            _ = row.weight
        except DataError as error:
            bad.append(error)
        else:
            yield row


def _check_share(recipe: Recipe, parts: Mapping[str, Sequence[Row]]) -> None:
    if not recipe.eval_share:
        return
    for name, wanted in (("eval", "holds out none"), ("train", "leaves none to train on")):
        if not parts[name]:
            total = sum(map(len, parts.values()))
            raise DataError(
                f"eval_share {recipe.eval_share:g} of {counted(total, 'row')} {wanted}; give another share, or other "
                "rows with --eval FILE."
            )
