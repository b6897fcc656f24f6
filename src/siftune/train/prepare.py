"""Prepare the rows of a run: their tokens, their faults, and a summary of them.

Rows that cannot be used are collected from all files and from the tokenizer, and reported together.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from siftune.base.errors import DataError, ModelError
from siftune.base.files import Progress
from siftune.base.text import counted, visible
from siftune.data.batches import aimed, numbered, weighted
from siftune.data.read import grouped
from siftune.data.rows import WEIGHT, Row, row_texts
from siftune.data.tokens import Form, tell_notes, tokens_of
from siftune.models.loss import IGNORED
from siftune.models.modules import check_window
from siftune.recipe.schema import Recipe, rate_of, target_comes_last
from siftune.recipe.training_rows import Read

logger = logging.getLogger(__name__)
_HIGH_RATE = 0.1  # ours; the highest rate that a measured method uses is 2e-3
_SHOWN = 20  # bad rows in an error; --dry-run lists all
_USES = {
    "train": "train on",
    "eval": "measure on",
    "support": "compare with",
    "avoid": "avoid",
    "keep": "keep predictions on",
}
NAMED = 5  # bad rows in the summary; the run folder has all


@dataclass(frozen=True)
class Prepared:
    """Usable rows and their tokens, by part."""

    rows: Mapping[str, Sequence[Row]]  # by part, as in `Read`
    # columns `input_ids`, `labels`, `length`; for training rows also `row`, their number, and `weight` unless all are 1
    data: Mapping[str, Dataset]
    cut: Mapping[str, int]  # number of rows cut at the recipe's `max_length`
    bad: Sequence[str]  # why rows were dropped, each row once


def prepare(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, read: Read, progress: Progress | None = None
) -> Prepared:
    """Tokenise the rows of a recipe. Only rows that train have weights.

    Raises:
        DataError: Rows are bad and the recipe does not drop them; or none is left.
        InputError: As `tokens_of`.
    """
    _tell_duplicates(read.parts["train"])
    if rate_of(recipe) > _HIGH_RATE:
        logger.warning("lr is %g: at rates above %g, training hardly ever converges", rate_of(recipe), _HIGH_RATE)
    form = Form(tokenizer, recipe.max_length, recipe.template, recipe.completion_only)
    rows, data, cut, bad = {}, {}, {}, list(read.bad)
    for name, part in read.parts.items():
        if not part:
            continue
        tokens = tokens_of(part, form, progress)
        rows[name], data[name], cut[name] = tokens.usable(part), tokens.data, tokens.cut
        bad += tokens.faults(part)
        tell_notes(tokens, len(part))
    reasons = list(dict.fromkeys(map(str, bad)))  # a repeated row is bad once
    _refuse_bad(recipe, reasons)
    why = grouped(reasons)[0] if reasons else "--drop-rows leaves out all"
    for name in read.parts:
        if not rows.get(name):
            raise DataError(f"none of the rows to {_USES[name]} can be used: {why}")
    if recipe.target and recipe.target_share:
        for of_target, which in ((True, "rows of the target"), (False, "other training rows")):
            if all(row.of_target != of_target for row in rows["train"]):
                raise DataError(f"none of the {which} can be used: {why}")
    weighed = {name: part if name in ("eval", "keep") else weighted(part, rows[name]) for name, part in data.items()}
    train = numbered(weighed["train"])
    if "eval" in weighed:
        weighed["eval"] = numbered(weighed["eval"])
    if recipe.target and target_comes_last(recipe) < 1:
        train = aimed(train, rows["train"])
    return Prepared(rows, {**weighed, "train": train}, cut, reasons)


def refuse_long(model: nn.Module, data: Mapping[str, Dataset]) -> None:
    """Refuse tokenised rows, by part, that are longer than the model's window.

    Raises:
        DataError: A row is longer.
    """
    for name, part in data.items():
        check_window(model, int(row_lengths(part).max()), f"a row to {_USES[name]}")


def _tell_duplicates(rows: Sequence[Row]) -> None:
    """Warn of training rows that repeat others, apart from the repeats of a target's rows."""
    own = [row for row in rows if not row.of_target]
    if twice := len(own) - len(set(row_texts(own))):
        logger.warning("%s of %s repeat earlier ones", f"{twice:,}", counted(len(own), "training row"))


def refuse_read(recipe: Recipe, read: Read, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> None:
    """Refuse bad rows before the model is loaded, together with rows that the tokenizer finds bad.

    Args:
        recipe: Resolved settings.
        read: Rows as read.
        tokenizer: Loads the model's tokenizer alone.

    Raises:
        DataError: Rows are bad and the recipe does not drop them.
    """
    if not read.bad or recipe.bad_rows == "drop":
        return
    with contextlib.suppress(ModelError):  # reported once the rows are corrected
        prepare(recipe, tokenizer(), read)
    _refuse_bad(recipe, list(dict.fromkeys(map(str, read.bad))))


def _refuse_bad(recipe: Recipe, bad: Sequence[str]) -> None:
    if not bad or recipe.bad_rows == "drop":
        return
    if len(bad) == 1:
        raise DataError(f"{bad[0]}; or leave it out with --bad-rows drop")
    reasons = grouped(bad)
    if len(reasons) == 1:
        raise DataError(f"{len(bad)} rows cannot be used: {reasons[0]}; or leave them out with --bad-rows drop")
    more = len(reasons) - _SHOWN
    last = [f"… and {more} more, which `siftune train --dry-run` lists"] if more > 0 else []
    lines = "\n  ".join([*reasons[:_SHOWN], *last])
    raise DataError(f"{len(bad)} rows cannot be used; correct them, or leave them out with --bad-rows drop:\n  {lines}")


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows of a part."""

    mean: float  # of a row
    longest: int  # of the longest row
    labels: float  # label tokens of a row, on average


def lengths_of(data: Dataset) -> Lengths:
    """Lengths of tokenised rows."""
    lengths = row_lengths(data)
    chunks = data.data.column("labels").chunks
    labels = sum(pc.sum(pc.not_equal(chunk.flatten(), IGNORED)).as_py() or 0 for chunk in chunks)
    return Lengths(float(lengths.mean()), int(lengths.max()), labels / len(data))


def row_lengths(data: Dataset) -> npt.NDArray[np.int32]:
    """Tokens of each row; (rows,) int32."""
    lengths: npt.NDArray[np.int32] = data.data.column("length").to_numpy()
    return lengths


def trained_and_held_out(rows: Mapping[str, Sequence[Row]]) -> int:
    """Number of held-out rows with the text of a training row, whose loss measures memorization."""
    trained = set(row_texts(rows["train"]))
    return sum(text in trained for text in row_texts(rows.get("eval", ())))


def rows_line(recipe: Recipe, prepared: Prepared) -> str:
    """Numbers and lengths of the rows as text."""
    data, lengths = prepared.data["train"], lengths_of(prepared.data["train"])
    heldout = cut = weights = ""
    if "eval" in prepared.data:
        both = trained_and_held_out(prepared.rows)
        warning = f" ({both:,} of them are training rows too, so the held-out loss is too low)" if both else ""
        heldout = f", {counted(len(prepared.data['eval']), 'row')} held out{warning}"
    if count := sum(prepared.cut.values()):
        cut = f"; {counted(count, 'row')} cut at --max-length {recipe.max_length}"
    if WEIGHT in data.column_names:
        counts = Counter(data[WEIGHT])
        zeros = f", {counts[0.0]} of them 0" if counts[0.0] else ""
        weights = f"; weights from {min(counts):g} to {max(counts):g}{zeros}"
    return (
        f"{counted(len(data), 'row')} to train on{heldout}: {lengths.mean:.0f} tokens on average, "
        f"{lengths.labels:.0f} of them labels, the longest {lengths.longest}{cut}{weights}"
    )


def bad_lines(prepared: Prepared, most: int, stops: bool = False) -> list[str]:
    """List at most `most` dropped rows, or rows that would stop a run."""
    if not prepared.bad:
        return []
    reasons = grouped(prepared.bad)
    more = len(reasons) - most
    rest = [f"  … and {more} more"] if more > 0 else []
    how = "cannot be used, so a run stops; --bad-rows drop leaves them out" if stops else "left out"
    return [
        f"{counted(len(prepared.bad), 'row')} {how}:",
        *(f"  {visible(reason)}" for reason in reasons[:most]),
        *rest,
    ]


def steps_text(steps: int, per_step: int, rows: int) -> str:
    """Number of optimizer steps and of rows in each as text.

    Example:
        >>> steps_text(20, 16, 300), steps_text(1, 16, 5)
        ('20 steps of 16 rows', '1 step of 5 rows, all there are')
    """
    text = f"{counted(steps, 'step')} of {counted(min(per_step, rows), 'row')}"
    return text if per_step <= rows else f"{text}, all there are"
