"""What a run trains and measures on: rows read, checked, divided, and as tokens.

Rows that cannot be used are gathered on the way, from all files and from the tokenizer, and told together.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from siftune.base.errors import DataError, ModelError
from siftune.base.files import Progress
from siftune.base.words import counted
from siftune.data.readers import load_rows
from siftune.data.rows import Row
from siftune.data.split import held_out
from siftune.data.target import with_target
from siftune.data.token_cache import cached_tokens
from siftune.data.tokenize import aimed, numbered, tell_notes, weighted
from siftune.data.tokens import Form
from siftune.recipe.schema import Recipe, compared_with, target_comes_last, train_files
from siftune.records.lists import named_rows, without
from siftune.train.folder.run import BAD_ROWS

logger = logging.getLogger(__name__)

_SHOWN = 20  # bad rows that an error names; --dry-run names all


@dataclass(frozen=True)
class Read:
    """Rows as they were read."""

    parts: Mapping[str, Sequence[Row]]  # `train`; and `eval` and `support`, where there are any
    bad: Sequence[DataError] = ()  # what is wrong with rows that are left out of them


@dataclass(frozen=True)
class Prepared:
    """Rows that can be trained and measured on, and their tokens."""

    rows: Mapping[str, Sequence[Row]]  # by part, as `Read` has them
    # their tokens: columns `input_ids`, `labels`, `length`; of the training rows also `row`, their number, and
    # `weight`, where a weight is not 1
    data: Mapping[str, Dataset]
    cut: Mapping[str, int]  # by part, how many rows are cut off at the recipe's `max_length`
    bad: Sequence[str]  # what is wrong with the rows that were left out, each row once


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


def prepare(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, read: Read, progress: Progress | None = None
) -> Prepared:
    """Tokenise rows as a recipe says, or take from the cache what was made of them before.

    All but the held-out ones, which are measured, have their weights.

    Raises:
        DataError: Rows are bad and the recipe does not say to drop them; or none is left.
        InputError: As `tokens_of`.
    """
    form = Form(tokenizer, recipe.max_length, recipe.template, recipe.completion_only)
    rows, data, cut, bad = {}, {}, {}, list(read.bad)
    for name, part in read.parts.items():
        tokens = cached_tokens(part, form, progress) if part else None
        if tokens is not None:
            rows[name], data[name], cut[name] = tokens.kept(part), tokens.data, tokens.cut
            bad += tokens.faults(part)
            tell_notes(tokens, len(part))
    told = list(dict.fromkeys(map(str, bad)))  # a row that comes several times is bad once
    refuse_bad(recipe, told)
    for name in read.parts:
        if not rows.get(name):
            raise DataError(f"none of the rows to {_USES[name]} can be used, such as: {told[0]}")
    weighed = {name: part if name == "eval" else weighted(part, rows[name]) for name, part in data.items()}
    train = numbered(weighed["train"])
    if recipe.target and target_comes_last(recipe) < 1:
        train = aimed(train, rows["train"])
    return Prepared(rows, {**weighed, "train": train}, cut, told)


_USES = {"train": "train on", "eval": "measure on", "support": "compare with"}


def refuse_read(recipe: Recipe, read: Read, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
    """Refuse bad rows before a model is loaded, together with those that would be found to be bad later on.

    `tokenizer` loads the model's tokenizer alone.

    Raises:
        DataError: There are some, and the recipe does not say to drop them.
    """
    if not read.bad or recipe.bad_rows == "drop":
        return
    with contextlib.suppress(ModelError):  # of which the user hears once the rows are mended
        prepare(recipe, tokenizer(), read)
    refuse_bad(recipe, list(dict.fromkeys(map(str, read.bad))))


def refuse_bad(recipe: Recipe, bad: Sequence[str]) -> None:
    """Refuse to go on with rows that cannot be used, unless the recipe says to drop them.

    Raises:
        DataError: With what is wrong with the first of them.
    """
    if not bad or recipe.bad_rows == "drop":
        return
    if len(bad) == 1:
        raise DataError(f"{bad[0].rstrip('.')}; or leave it out with --bad-rows drop.")
    more = len(bad) - _SHOWN
    last = [f"… and {more} more, which `siftune train --dry-run` lists"] if more > 0 else []
    lines = "\n  ".join([*bad[:_SHOWN], *last])
    raise DataError(f"{len(bad)} rows cannot be used; mend them, or leave them out with --bad-rows drop:\n  {lines}")
