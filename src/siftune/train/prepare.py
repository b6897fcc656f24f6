"""Prepare a run: the model source, the rows and their tokens, and a summary of them.

Rows that cannot be used are collected from all files and from the tokenizer, and reported together.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.compute
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.base.errors import DataError, ModelError
from siftune.base.files import Progress
from siftune.base.words import counted
from siftune.data.rows import WEIGHT, Row, said
from siftune.data.token_cache import cached_tokens
from siftune.data.tokenize import aimed, numbered, tell_notes, weighted
from siftune.data.tokens import Form
from siftune.models.load import load_model, load_tokenizer
from siftune.models.loss import IGNORED
from siftune.models.source import check_source
from siftune.recipe.schema import Recipe, target_comes_last
from siftune.records.rows import (
    Read,
)
from siftune.train.build import refuse_all_weights

logger = logging.getLogger(__name__)
_SHOWN = 20  # bad rows that an error names; --dry-run names all
_USES = {"train": "train on", "eval": "measure on", "support": "compare with"}
NAMED = 5  # bad rows that are named; the run folder has all


class Source(Protocol):
    """What a run needs to know of that which is tuned."""

    @property
    def usage(self) -> str | None:
        """What the model card says on the use of the result; None for what it says of any adapter."""

    def settle(self, recipe: Recipe) -> Recipe:
        """Fill in the recipe's `layers` where this decides them, before anything is loaded.

        Raises:
            InputError: The recipe asks for what cannot train here.
        """

    def load(self, dtype: str, quantize: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load model and tokenizer; `dtype` and `quantize` as for `load_model`."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer alone."""

    def leaves(
        self, model: nn.Module, privacy: Mapping[str, Any] | None = None
    ) -> Mapping[str, Callable[[Path], None]]:
        """What a run on it leaves besides an adapter: name of a subfolder of the run -> what writes that folder.

        Where there is any, it stands for layers that were tuned themselves: these are not saved once more. `privacy` is
        what a private run says of itself; see `methods.dp.accounting.statement`.
        """


@dataclass(frozen=True)
class ModelSource:
    """An ordinary model."""

    name: str  # a folder, a hub id or smollm2
    usage: str | None = None

    def settle(self, recipe: Recipe) -> Recipe:
        """Leave the recipe as it is; see `refuse_all_weights` and `check_source` for what is refused."""
        refuse_all_weights(recipe)
        check_source(self.name)
        return recipe

    def load(self, dtype: str, quantize: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load it by `load_model`."""
        return load_model(self.name, dtype, quantize=quantize)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load it by `load_tokenizer`."""
        return load_tokenizer(self.name)

    def leaves(
        self, model: nn.Module, privacy: Mapping[str, Any] | None = None
    ) -> Mapping[str, Callable[[Path], None]]:
        """Nothing: the adapter, or the layers that were tuned themselves, say it all."""
        return {}


@dataclass(frozen=True)
class Prepared:
    """Rows that can be trained and measured on, and their tokens."""

    rows: Mapping[str, Sequence[Row]]  # by part, as `Read` has them
    # their tokens: columns `input_ids`, `labels`, `length`; of the training rows also `row`, their number, and
    # `weight`, where a weight is not 1
    data: Mapping[str, Dataset]
    cut: Mapping[str, int]  # by part, how many rows are cut off at the recipe's `max_length`
    bad: Sequence[str]  # what is wrong with the rows that were left out, each row once


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


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows of a part."""

    mean: float  # of a row
    longest: int  # of the longest row
    learned: float  # of a row, those that are learned, on average


def lengths_of(data: Dataset) -> Lengths:
    """Look at tokenised rows."""
    lengths = row_lengths(data)
    labels = data.data.column("labels")
    learned = sum(
        pyarrow.compute.sum(pyarrow.compute.not_equal(chunk.flatten(), IGNORED)).as_py() or 0 for chunk in labels.chunks
    )
    return Lengths(float(lengths.mean()), int(lengths.max()), learned / len(data))


def row_lengths(data: Dataset) -> npt.NDArray[np.int32]:
    """Tokens of each row; (rows,) int32."""
    found: npt.NDArray[np.int32] = data.data.column("length").to_numpy()
    return found


def rows_line(recipe: Recipe, prepared: Prepared) -> str:
    """Say how many rows there are, and how long they are."""
    data, held = prepared.data["train"], prepared.data.get("eval")
    seen = lengths_of(data)
    out = "" if held is None else f", {counted(len(held), 'row')} held out{_trained_too(prepared)}"
    return (
        f"{counted(len(data), 'row')} to train on{out}: {seen.mean:.0f} tokens on average, {seen.learned:.0f} of them "
        f"learned, the longest {seen.longest}{_cut(recipe, prepared)}{_weights(data)}"
    )


def trained_and_held_out(rows: Mapping[str, Sequence[Row]]) -> int:
    """How many of the held-out rows say what a training row says, so that their loss tells little."""
    trained = set(said(rows["train"]))
    return sum(words in trained for words in said(rows.get("eval", ())))


def _trained_too(prepared: Prepared) -> str:
    count = trained_and_held_out(prepared.rows)
    return f" ({count:,} of them trained on, too, so that the held-out loss flatters)" if count else ""


def bad_lines(prepared: Prepared, most: int, stops: bool = False) -> list[str]:
    """Say which rows are left out, or would stop a run, naming so many of them at the most."""
    if not prepared.bad:
        return []
    more = len(prepared.bad) - most
    rest = [f"  … and {more} more"] if more > 0 else []
    how = "cannot be used, for which a run stops; --bad-rows drop leaves them out" if stops else "left out"
    return [f"{counted(len(prepared.bad), 'row')} {how}:", *(f"  {reason}" for reason in prepared.bad[:most]), *rest]


def _cut(recipe: Recipe, prepared: Prepared) -> str:
    cut = sum(prepared.cut.values())
    return f"; {counted(cut, 'row')} cut at --max-length {recipe.max_length}" if cut else ""


def _weights(data: Dataset) -> str:
    if WEIGHT not in data.column_names:
        return ""
    weights = Counter(data[WEIGHT])
    zeros = f", {weights[0.0]} of them 0, which teach nothing" if weights[0.0] else ""
    return f"; weights go from {min(weights):g} to {max(weights):g}{zeros}"


def steps_in_words(steps: int, per_step: int, rows: int) -> str:
    """Say how many optimizer steps a run has, of how many rows: all of them where there are fewer than a step takes.

    Example:
        >>> steps_in_words(20, 16, 300), steps_in_words(1, 16, 5)
        ('20 steps of 16 rows', '1 step of 5 rows, all there are')
    """
    told = f"{counted(steps, 'step')} of {counted(min(per_step, rows), 'row')}"
    return told if per_step <= rows else f"{told}, all there are"
