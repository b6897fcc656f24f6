"""A Trainer that records the rows of each batch, and the ceiling: training on correct target rows alone.

The gradient of the ceiling's step is that of the mean loss over the labels of those rows. A batch without such a row is
skipped: it forms no gradients, so that the optimizer leaves every parameter as it is.

Shapes: B rows in a batch, K of them trained on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from siftune.base.errors import RecipeError
from siftune.models.loss import label_positions
from siftune.train.trainer import SiftTrainer

Record = dict[str, Any]
Batch = Mapping[str, Tensor]

_QUARTERS, _THIRDS = 4, 3
_ALL = -1.0  # depth of a choice that holds for all layers


class Book:
    """Finds the rows of a batch again by their tokens.

    Args:
        data: Tokenised rows.
        rows: What they were made of; rows of the same tokens stand for one another.
    """

    def __init__(self, data: Any, rows: Sequence[Record]) -> None:
        self._rows = dict(zip(map(tuple, data["input_ids"]), rows, strict=True))

    def rows(self, batch: Batch) -> list[Record]:
        """The rows of a batch, in its order."""
        pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        return [self._rows[tuple(ids[seen].tolist())] for ids, seen in pairs]


class Followed:
    """Adds up weights of rows.

    Args:
        groups: The groups that rows may be of.
    """

    def __init__(self, groups: Sequence[str]) -> None:
        self.groups = list(dict.fromkeys(groups))
        self._seen: list[list[float]] = []  # step, depth, a weight per group
        self._followed: list[list[float]] = []

    def see(self, step: int, rows: Sequence[Record]) -> None:
        """Note the rows of a batch."""
        self._seen.append([step, _ALL, *self._by_group(rows, [1.0] * len(rows))])

    def follow(
        self, step: int, depth: float | None, rows: Sequence[Record], weights: Sequence[float] | None = None
    ) -> None:
        """Note the rows that are followed.

        Args:
            step: Optimizer steps done before.
            depth: Where the layer stands, from 0 to below 1; None where the choice holds for all layers.
            rows: The rows.
            weights: How much each counts; 1 where it is None.
        """
        counted = self._by_group(rows, weights or [1.0] * len(rows))
        self._followed.append([step, _ALL if depth is None else depth, *counted])

    def summary(self, steps: int) -> Record:
        """Shares by group: `batches`, of the rows seen; if rows were chosen also `followed`, `quarters`, `thirds`.

        Args:
            steps: Optimizer steps of the whole training.
        """
        found: Record = {"batches": self._shares(np.array(self._seen))}
        if self._followed:
            notes = np.array(self._followed)
            quarter, third = notes[:, 0] * _QUARTERS // max(1, steps), notes[:, 1] * _THIRDS // 1
            found["followed"] = self._shares(notes)
            found["quarters"] = [self._shares(notes[quarter == part]) for part in range(_QUARTERS)]
            if (third >= 0).any():
                found["thirds"] = [self._shares(notes[third == part]) for part in range(_THIRDS)]
        return found

    def _by_group(self, rows: Sequence[Record], weights: Sequence[float]) -> list[float]:
        sums = dict.fromkeys(self.groups, 0.0)
        for row, weight in zip(rows, weights, strict=True):
            sums[row["group"]] += weight
        return list(sums.values())

    def _shares(self, notes: NDArray[np.float64]) -> dict[str, float]:
        """Shares of the groups in some notes; none where there are no notes."""
        sums = notes[:, 2:].sum(axis=0) if len(notes) else np.zeros(len(self.groups))
        whole = sums.sum()
        return {name: round(float(part / whole), 4) for name, part in zip(self.groups, sums, strict=True) if whole}


class SubsetTrainer(SiftTrainer):
    """siftune's Trainer, which records the rows of each batch and may train on the target's correct rows alone.

    Attributes:
        book: Finds the rows of a batch.
        followed: Counts them.
        ceiling: Train on the target's correct rows alone.
        seen: Rows of the last batch.
    """

    book: Book
    followed: Followed
    ceiling: bool
    seen: Sequence[Record]

    @classmethod
    def take_over(cls, trainer: SiftTrainer, book: Book, followed: Followed, ceiling: bool = False) -> "SubsetTrainer":
        """Turn a Trainer that is set up into this one; all else stays as it is.

        Raises:
            RecipeError: Gradients are accumulated: the number of labels is not known before the last batch.
        """
        if ceiling and trainer.args.gradient_accumulation_steps > 1:
            raise RecipeError("the ceiling takes rows of one batch: leave accumulate at 1")
        trainer.__class__ = cls
        trainer.book, trainer.followed, trainer.ceiling, trainer.seen = book, followed, ceiling, ()
        return trainer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Note the rows, and train on them, or on the target's as if the batch had no others."""
        batch = self._prepare_inputs(inputs)
        self.seen = self.book.rows(batch)
        self.followed.see(self.state.global_step, self.seen)
        if not self.ceiling:
            return super().training_step(model, batch, num_items_in_batch)
        places = [place for place, row in enumerate(self.seen) if row["group"] in ("target", "known")]
        self.followed.follow(self.state.global_step, None, [self.seen[place] for place in places])
        if not places:
            return torch.zeros((), device=batch["labels"].device)
        longest = int(batch["attention_mask"][places].sum(1).max())
        part = {name: values[places, :longest] for name, values in batch.items()}
        return super().training_step(model, part, label_positions(part["labels"]).sum())
