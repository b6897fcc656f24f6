"""Turn rows into token ids and labels, and token ids into batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from siftune.base.errors import DataError
from siftune.data.rows import WEIGHT, Row
from siftune.data.target import TARGET, sources
from siftune.data.tokens import Form, Tokens, tokens_of
from siftune.models.loss import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

ROW = "row"  # column for the number of a row
AIMED = "aimed"  # column that says whether a row is the target's, where those come last
_BESIDE = {ROW: torch.int64, WEIGHT: torch.float32}  # columns of one number a row, which the model never sees


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: str = "auto",
    completion_only: bool = True,
) -> Dataset:
    """Tokenise rows, all of which must be of use.

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
    tokens = tokens_of(rows, Form(tokenizer, max_length, template, completion_only))
    for fault in tokens.faults(rows):
        raise fault
    if tokens.cut:
        logger.warning("%d of %d rows are cut at --max-length %d tokens", tokens.cut, len(rows), max_length)
    tell_notes(tokens, len(rows))
    return tokens.data


def tell_notes(tokens: Tokens, count: int) -> None:
    """Warn once of each way in which some of `count` rows were rendered that the user should know of."""
    for note, times in tokens.notes.items():
        logger.warning("%d of %d rows: %s", times, count, note)


def numbered(rows: Dataset) -> Dataset:
    """Add the column `row`, which says of every row where it stands; batches then tell which rows they are of."""
    return rows.add_column(ROW, list(range(len(rows))))


def weighted(data: Dataset, rows: Sequence[Row]) -> Dataset:
    """Add the column `weight`, where a row has a weight other than 1.

    Args:
        data: The rows' tokens, in the same order.
        rows: The rows.

    Raises:
        DataError: A weight is no finite number from 0, or all are 0.
    """
    weights = [row.weight for row in rows]
    if not any(weights):
        raise DataError("every row has the weight 0, so that there is nothing to learn; give some a weight above 0.")
    return data if all(weight == 1 for weight in weights) else data.add_column(WEIGHT, weights)


def aimed(data: Dataset, rows: Sequence[Row]) -> Dataset:
    """Add the column `aimed`, which says of every row whether it is one of the target's.

    Args:
        data: The rows' tokens, in the same order.
        rows: The rows.
    """
    return data.add_column(AIMED, [source == TARGET for source in sources(rows)])


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
        """Collate rows with `input_ids`, `labels` and, where they have them, `row` and `weight`.

        Returns:
            `input_ids`, `attention_mask` (1 on tokens, 0 on padding) and `labels` (-100 on padding), each
            (B, T) int64; `row`, (B,) int64; and `weight`, (B,) float32. Other columns are left out.
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
        for name, dtype in _BESIDE.items():
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=dtype)
        return batch
