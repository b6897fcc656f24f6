"""Draw of each step's rows, and their batches.

The rows come from the run's secret, as the noise does: ε assumes that nobody knows which rows a step drew.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Sampler

from siftune.methods.dp.secret import Secret


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
) -> Mapping[str, Tensor]:
    """Collate rows; without rows the batch has the usual tensors of length 0."""
    return collate(rows) if rows else {name: value[:0] for name, value in collate([dataset[0]]).items()}


def parts(batch: Mapping[str, Tensor], most: int) -> Sequence[dict[str, Tensor]]:
    """Split a batch evenly into parts of at most `most` rows; an empty batch has none.

    The batch has (B, T) tensors, padded on the right as `attention_mask` says, and (B,) ones; each part is as wide as
    its longest row.
    """
    count = math.ceil(len(batch["attention_mask"]) / most)
    split = {name: value.tensor_split(count) for name, value in batch.items()} if count else {}
    return [_narrow({name: pieces[number] for name, pieces in split.items()}) for number in range(count)]


def _narrow(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    width = int(batch["attention_mask"].sum(1).max())
    return {name: value[:, :width] if value.ndim > 1 else value for name, value in batch.items()}
