"""Turn rows into token ids and labels, and token ids into batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from siftune.data.encoder import Encoder
from siftune.data.rows import Row
from siftune.errors import DataError
from siftune.models.loss import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

ROW = "row"  # column for the number of a row

_CHUNK = 2000  # rows held as Python lists at a time; the table itself is in Arrow memory


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: str = "auto",
    completion_only: bool = True,
) -> Dataset:
    """Tokenise rows for training.

    Args:
        rows: at least one row.
        tokenizer: the model's tokenizer.
        max_length: longest sequence in tokens; what is over is cut off at the end, and counted in a warning.
        template: `chat`, `none`, or `auto` for the chat template if the tokenizer has one.
        completion_only: learn the completions only; False learns the prompts too.

    Returns:
        Columns `input_ids` (int32 lists), `labels` (int32 lists, -100 where nothing is learned) and `length`.

    Raises:
        DataError: no rows, or a row whose prompt leaves nothing to learn within `max_length`.
        RecipeError, ModelError: as `Encoder`.
    """
    from datasets import Dataset, Features, List, Value, concatenate_datasets

    if not rows:
        raise DataError("there are no rows to tokenise; give at least one.")
    encoder = Encoder(tokenizer, template)
    ids = List(Value("int32"))
    features = Features({"input_ids": ids, "labels": ids, "length": Value("int32")})
    chunks, cut = [], 0
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "length": []}
        for row, (tokens, learned) in zip(chunk, encoder.encode(chunk), strict=True):
            labels = _labels(tokens, learned if completion_only else [True] * len(tokens), max_length, row)
            columns["input_ids"].append(tokens[:max_length])
            columns["labels"].append(labels)
            columns["length"].append(len(labels))
            cut += len(tokens) > max_length
        chunks.append(Dataset.from_dict(columns, features=features))
    _report(encoder, cut, len(rows), max_length)
    return concatenate_datasets(chunks) if len(chunks) > 1 else chunks[0]


def numbered(rows: Dataset) -> Dataset:
    """Add the column `row`, which says of every row where it stands; batches then tell which rows they are of."""
    return rows.add_column(ROW, list(range(len(rows))))


def _labels(tokens: list[int], learned: list[bool], max_length: int, row: Row) -> list[int]:
    """Labels of one row within the limit; refuses a row of which nothing can be learned."""
    labels = [token if on else IGNORED for token, on in zip(tokens[:max_length], learned, strict=False)]
    if any(label != IGNORED for label in labels[1:]):  # the first token is never predicted
        return labels
    first = next((i for i, on in enumerate(learned) if on and i), len(tokens))
    raise DataError(
        f"{row.origin}: the prompt takes {first} of {len(tokens)} tokens, but the limit is {max_length}, so "
        f"nothing is left to learn; raise --max-length to {len(tokens)}, or shorten or remove the row."
    )


def _report(encoder: Encoder, cut: int, count: int, max_length: int) -> None:
    """Warn once of each thing that the user should know, with the number of rows it concerns."""
    if cut:
        logger.warning("%d of %d rows are cut at --max-length %d tokens", cut, count, max_length)
    for note, times in encoder.notes.items():
        logger.warning("%d of %d rows: %s", times, count, note)


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right into one batch.

    Not transformers' `DataCollatorForSeq2Seq`: that one pads on the side that the tokenizer says, and hands every other
    column of numbers on to the model.

    Attributes:
        pad_token_id: fills `input_ids`; the model never sees it, because the attention mask is 0 there.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Collate rows with `input_ids`, `labels` and, where they are numbered, `row`; other columns are left out.

        Returns:
            `input_ids`, `attention_mask` (1 on tokens, 0 on padding) and `labels` (-100 on padding), each
            (B, T) int64; and `row`, (B,) int64.
        """
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED),
        }
        for i, row in enumerate(rows):
            count = len(row["input_ids"])
            batch["input_ids"][i, :count] = torch.as_tensor(row["input_ids"])
            batch["attention_mask"][i, :count] = 1
            batch["labels"][i, :count] = torch.as_tensor(row["labels"])
        return {**batch, ROW: torch.tensor([row[ROW] for row in rows])} if ROW in rows[0] else batch
