"""Which rows were followed: counts by group of row, over the course of training and over the depth of the model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = dict[str, Any]
_QUARTERS, _THIRDS = 4, 3
_ALL = -1.0  # depth of a choice that holds for all layers


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
        """Shares by group: `batches`, of the rows seen; and where rows were chosen `followed`, `quarters`, `thirds`.

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
