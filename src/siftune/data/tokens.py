"""Tokenisation of rows into Arrow tables, in chunks.

A row that cannot be used is left out and reported; the other rows of its chunk are not affected.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from siftune.base.errors import DataError
from siftune.base.files import Progress
from siftune.data.encode import Encoder, Piece, labelled
from siftune.data.rows import Row, no_garbage
from siftune.models.loss import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000  # rows held as Python lists at a time; the table itself is in Arrow memory
_MANY = 10_000  # rows that take seconds: their progress is shown


@dataclass(frozen=True)
class Form:
    """Settings of tokenisation.

    Attributes:
        tokenizer: the model's.
        max_length: longest sequence in tokens; longer ones are cut at the end.
        template: `chat`, `none`, `auto` for the chat template if the tokenizer has one, or a file with one.
        completion_only: only completions have labels; False: prompts too.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    template: str | Path = "auto"
    completion_only: bool = True


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows.

    Attributes:
        data: columns `input_ids` (int32 lists), `labels` (int32 lists, -100 at tokens without a label) and `length`,
            of the usable rows, in their order.
        bad: place of an unusable row -> its error without the origin.
        cut: number of rows cut at the limit.
        notes: number of rows with a warning about their rendering, by warning.
    """

    data: Dataset
    bad: dict[int, str] = field(default_factory=dict)
    cut: int = 0
    notes: Counter[str] = field(default_factory=Counter)

    def usable(self, rows: Sequence[Row]) -> list[Row]:
        """Select the rows of `data`."""
        return [row for place, row in enumerate(rows) if place not in self.bad]

    def faults(self, rows: Sequence[Row]) -> list[DataError]:
        """Return the errors of the other rows."""
        return [DataError(f"{rows[place].origin}: {reason}") for place, reason in self.bad.items()]


class _Chunk(NamedTuple):
    """Concatenated tokens of some rows."""

    ids: array[int]
    labels: array[int]
    lengths: array[int]
    bad: dict[int, str]
    cut: int
    notes: Counter[str]


def tokens_of(rows: Sequence[Row], form: Form, progress: Progress | None = None) -> Tokens:
    """Tokenise rows.

    Args:
        rows: at least one.
        form: settings.
        progress: receives the number of tokenised rows if there are many.

    Raises:
        DataError: no rows.
        RecipeError, ModelError: as `Encoder`.
    """
    if not rows:
        raise DataError("there are no rows to tokenise; give at least one")
    encoder = Encoder(form.tokenizer, form.template)
    bad: dict[int, str] = {}
    chunks, cut, notes = [], 0, Counter[str]()
    for start in range(0, len(rows), _CHUNK):
        with no_garbage():
            chunk = _tokenised(encoder, rows[start : start + _CHUNK], form)
        chunks.append(_lists(chunk))
        bad |= {start + place: reason for place, reason in chunk.bad.items()}
        cut += chunk.cut
        notes += chunk.notes
        if progress is not None and len(rows) >= _MANY:
            progress("tokenising rows", min(start + _CHUNK, len(rows)), len(rows))
    return Tokens(_table(chunks), bad, cut, notes)


def _tokenised(encoder: Encoder, rows: Sequence[Row], form: Form) -> _Chunk:
    encoder.notes = Counter()
    chunk = _Chunk(array("i"), array("i"), array("i"), {}, 0, encoder.notes)
    cut = 0
    for place, (row, pieces) in enumerate(zip(rows, encoder.encode(rows), strict=True)):
        try:
            ids, labels = _row(pieces, form, row.origin)
        except DataError as error:
            chunk.bad[place] = str(error).removeprefix(f"{row.origin}: ")
            continue
        cut += len(ids) > form.max_length
        chunk.ids.extend(ids[: form.max_length])
        chunk.labels.extend(labels[: form.max_length])
        chunk.lengths.append(min(len(ids), form.max_length))
    return chunk._replace(cut=cut, notes=encoder.notes)


def _row(pieces: list[Piece] | DataError, form: Form, origin: str) -> tuple[list[int], list[int]]:
    """Return token ids and labels of one row; refuse a row without a label within the limit."""
    ids, labels = labelled(pieces, form.completion_only)
    first = next(
        (i for i, label in enumerate(labels) if label != IGNORED and i), len(ids)
    )  # the first is not predicted
    if first >= min(form.max_length, len(ids)):
        raise DataError(
            f"{origin}: the prompt takes {first} of {len(ids)} tokens, but the limit is {form.max_length}, so nothing "
            f"is left to learn; raise --max-length to {len(ids)}, or shorten or remove the row"
        )
    return ids, labels


def _lists(chunk: _Chunk) -> dict[str, Any]:
    """Convert a chunk's columns to Arrow arrays."""
    import pyarrow

    lengths = np.asarray(chunk.lengths, dtype=np.int32)
    ends = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    ids, labels = (
        pyarrow.ListArray.from_arrays(ends, np.asarray(values, dtype=np.int32)) for values in (chunk.ids, chunk.labels)
    )
    return {"input_ids": ids, "labels": labels, "length": pyarrow.array(lengths)}


def _table(chunks: Sequence[dict[str, Any]]) -> Dataset:
    """Concatenate chunks, in one call, since `datasets` scans every table that it receives."""
    import pyarrow
    from datasets import Dataset, Features, List, Value

    numbers = List(Value("int32"))
    columns = {name: pyarrow.chunked_array([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return Dataset.from_dict(
        columns, features=Features({"input_ids": numbers, "labels": numbers, "length": Value("int32")})
    )


logger = logging.getLogger(__name__)


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: str | Path = "auto",
    completion_only: bool = True,
) -> Dataset:
    """Tokenise rows, all of which must be usable.

    Args:
        rows: at least one row.
        tokenizer: the model's tokenizer.
        max_length: longest sequence in tokens; longer ones are cut at the end, and counted in a warning.
        template: `chat`, `none`, `auto` for the chat template if the tokenizer has one, or a file with one.
        completion_only: only completions have labels; False: prompts too.

    Returns:
        Columns `input_ids` (int32 lists), `labels` (int32 lists, -100 at tokens without a label) and `length`.

    Raises:
        DataError: no rows, or a row whose prompt leaves nothing to learn within `max_length`.
        RecipeError, ModelError: as `Encoder`.
    """
    tokens = tokens_of(rows, Form(tokenizer, max_length, template, completion_only))
    for fault in tokens.faults(rows):
        raise fault
    if tokens.cut:
        logger.warning("%d of %d rows are cut at --max-length %d tokens", tokens.cut, len(rows), max_length)
    tell_notes(tokens, len(rows))
    return tokens.data


def tell_notes(tokens: Tokens, count: int) -> None:
    """Log each warning about the rendering of some of `count` rows once."""
    for note, times in tokens.notes.items():
        logger.warning("%d of %d rows: %s", times, count, note)
