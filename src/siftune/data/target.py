"""Rows of a target among other training rows: few rows that count more than the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from siftune.data.rows import Row

SOURCE = "source"  # column that says where a row is from, where the data has it
TARGET = "target"  # what it says of rows of a target
OTHER = "other"  # what stands for a row that does not say
_MOST = 30  # ours: times that a row of the target is repeated at the most


def with_target(rows: Sequence[Row], target: Sequence[Row], share: float) -> list[Row]:
    """Put a target's rows after the others, repeated until they are a share of all rows.

    Each comes at least once and 30 times at the most, all equally often but for one. Their column `source` says
    "target".

    Args:
        rows: The other training rows.
        target: Rows of the target.
        share: Share of all rows that the target's are to make up, below 1; 0 leaves them out.

    Example:
        >>> from siftune.data.rows import rows_from
        >>> few, many = rows_from([{"prompt": "2+2=", "completion": "4"}]), rows_from([{"text": "Once."}] * 6)
        >>> len(with_target(many, few, 0.25))
        8
    """
    if not share:
        return list(rows)
    marked = [replace(row, extra={**row.extra, SOURCE: TARGET}) for row in target]
    return [*rows, *(marked[place % len(marked)] for place in range(repeats(len(rows), len(target), share)))]


def repeats(others: int, target: int, share: float) -> int:
    """Number of rows that a target's rows are, where each comes as often as `with_target` has it."""
    return min(max(round(others * share / (1 - share)), target), _MOST * target)


def sources(rows: Sequence[Row]) -> list[str]:
    """Where rows are from: their column `source`, or "other"."""
    return [str(row.extra.get(SOURCE, OTHER)) for row in rows]
