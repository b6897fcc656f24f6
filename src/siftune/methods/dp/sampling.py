"""Draw of each step's rows, and their batches.

The rows come from the run's secret, as the noise does: ε assumes that nobody knows which rows a step drew.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from siftune.methods.dp.secret import Secret

LENGTHS = "lengths"  # in a step's batch, on the CPU: tokens of each row


class PoissonBatches(Sampler[list[int]]):
    """Draws each of n rows independently for each step, with probability `rate`; a step may be empty."""

    def __init__(self, rows: int, rate: float, secret: Secret) -> None:
        self._rows = rows
        self._rate = rate
        self._secret = secret
        self._epoch = 0

    def __len__(self) -> int:
        """Steps in an expected pass over the rows, the Trainer's epoch."""
        return math.ceil(1 / self._rate)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the next steps."""
        self._epoch = epoch

    def draw(self, step: int) -> list[int]:
        """Numbers of the rows of a step, ascending."""
        uniform = self._secret.stream("rows", step).uniform(self._rows)
        return (uniform < self._rate).nonzero().flatten().tolist()

    def __iter__(self) -> Iterator[list[int]]:
        first = self._epoch * len(self)
        return map(self.draw, range(first, first + len(self)))


def collate_any(
    collate: Callable[[list[Any]], Mapping[str, Tensor]], dataset: Any, rows: list[Any]
) -> Mapping[str, Any]:
    """Collate rows; without rows the batch has the usual tensors of length 0."""
    batch = collate(rows) if rows else {name: value[:0] for name, value in collate([dataset[0]]).items()}
    return {**batch, LENGTHS: batch["attention_mask"].sum(1).numpy()}


def parts(batch: Mapping[str, Any], most: int) -> Sequence[dict[str, Tensor]]:
    """Split a batch evenly into parts of at most `most` rows; an empty batch has none.

    The batch has (B, T) tensors, padded on the right as `attention_mask` says, and (B,) ones; each part is as wide as
    its longest row.
    """
    batch = dict(batch)
    lengths: Any = batch.pop(LENGTHS, None)
    lengths = batch["attention_mask"].sum(1).cpu().numpy() if lengths is None else lengths
    count = math.ceil(len(lengths) / most)
    split = {name: torch.as_tensor(value).tensor_split(count) for name, value in batch.items()} if count else {}
    widths = [int(part.max()) for part in np.array_split(lengths, count)] if count else []
    return [
        {name: piece[number][:, :width] if piece[number].ndim > 1 else piece[number] for name, piece in split.items()}
        for number, width in enumerate(widths)
    ]
