"""Batches of tokenised rows: columns beside the tokens, padding, and the order of the rows in a run.

Order (ours): if a target's rows come last, they come in the last part of the steps and the others from the start. The
decay phase of MiniCPM (arXiv 2404.06395) likewise ends pretraining on the data that counts. docs/measured_target.md
compares it with rows in random order throughout.

With D rows in an epoch, of which the share p are the target's, N rows in the complete run and the last part f of it:

    target     round(p N) draws, all of them in the last max(f, p) N
    others     the other draws, as many as in random order

Each kind is passed through repeatedly in random order: no row comes twice before all others of its kind have come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Sampler

from siftune.base.errors import DataError
from siftune.data.rows import WEIGHT, Row
from siftune.models.loss import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

ROW = "row"  # column with the number of a row
AIMED = "aimed"  # column, true in rows of the target, if these come last


def numbered(rows: Dataset) -> Dataset:
    """Add the column `row` with the number of each row, so that batches name their rows."""
    return rows.add_column(ROW, list(range(len(rows))))


def weighted(data: Dataset, rows: Sequence[Row]) -> Dataset:
    """Add the column `weight` if a row has a weight other than 1.

    Args:
        data: The rows' tokens, in the same order.
        rows: The rows.

    Raises:
        DataError: A weight is no finite number from 0, or all are 0.
    """
    weights = [row.weight for row in rows]
    if not any(weights):
        raise DataError("every row has the weight 0, so that no row trains; give some a weight above 0")
    return data if all(weight == 1 for weight in weights) else data.add_column(WEIGHT, weights)


def aimed(data: Dataset, rows: Sequence[Row]) -> Dataset:
    """Add the column `aimed`, true in rows of the target.

    Args:
        data: The rows' tokens, in the same order.
        rows: The rows.
    """
    return data.add_column(AIMED, [row.of_target for row in rows])


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right into one batch.

    Not transformers' `DataCollatorForSeq2Seq`: it pads on the tokenizer's side, and passes every other column of
    numbers to the model.

    Attributes:
        pad_token_id: fills `input_ids`; the model never sees it, because the attention mask is 0 there.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows with `input_ids`, `labels` and, if present, `row` and `weight`.

        Returns:
            `input_ids`, `attention_mask` (1 on tokens, 0 on padding) and `labels` (-100 on padding), each
            (B, T) int64; `row`, (B,) int64; and `weight`, (B,) float32. Other columns are left out. `row` is an array,
            so that it stays on the CPU when a Trainer moves tensors to its device.
        """
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        batch: dict[str, Any] = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED),
        }
        for i, row in enumerate(rows):
            count = len(row["input_ids"])
            batch["input_ids"][i, :count] = torch.as_tensor(row["input_ids"])
            batch["attention_mask"][i, :count] = 1
            batch["labels"][i, :count] = torch.as_tensor(row["labels"])
        if ROW in rows[0]:
            batch[ROW] = np.array([row[ROW] for row in rows])
        if WEIGHT in rows[0]:
            batch[WEIGHT] = torch.tensor([row[WEIGHT] for row in rows], dtype=torch.float32)
        return batch


Places = np.ndarray[tuple[int], np.dtype[np.int64]]


class TargetLast(Sampler[int]):
    """Sampler of an epoch's rows in a run in which a target's rows come last.

    Args:
        aimed: Which rows are the target's, (D,) bool; some are, and some are not.
        draws: N, rows that the run draws in all epochs.
        last: f, share of the run in which the target's rows come, above 0.
        seed: Of the order.

    Example:
        >>> order = TargetLast([False] * 6 + [True] * 2, draws=16, last=0.25, seed=0)
        >>> order.set_epoch(0)
        >>> len(order), sorted(set(order))
        (8, [0, 1, 2, 3, 4, 5])
    """

    def __init__(self, aimed: Sequence[bool], draws: int, last: float, seed: int) -> None:
        self._size = len(aimed)
        self._order = order_of_run(np.asarray(aimed, dtype=bool), draws, last, seed)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        begin = self._epoch * self._size
        return iter(self._order[begin : begin + self._size].tolist())


def order_of_run(aimed_D: np.ndarray[tuple[int], np.dtype[np.bool_]], draws: int, last: float, seed: int) -> Places:
    """Draw the order of a complete run, as `TargetLast`.

    Returns:
        (E D,) int64 places, in the E epochs that N draws begin; rows of both kinds follow the N.
    """
    randomness = np.random.default_rng(seed)
    target_places, other_places = np.flatnonzero(aimed_D), np.flatnonzero(~aimed_D)
    of_target = round(draws * len(target_places) / len(aimed_D))
    early = draws - max(round(draws * last), of_target)
    others = _again(other_places, draws - of_target, randomness)
    late = randomness.permutation(np.concatenate([others[early:], _again(target_places, of_target, randomness)]))
    beyond = _again(np.arange(len(aimed_D)), -draws % len(aimed_D), randomness)
    return np.concatenate([others[:early], late, beyond])


def _again(places: Places, count: int, randomness: np.random.Generator) -> Places:
    """Repeat random orders of places until there are `count`."""
    passes = [randomness.permutation(places) for _ in range(-(-count // len(places)))]
    return np.concatenate([*passes, np.empty(0, dtype=np.int64)])[:count]


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of indices of similar length, the longest first, so that a lack of memory shows at once.

    Raises:
        ValueError: `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
