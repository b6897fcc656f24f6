"""Shares of rows: a target's rows among others, and rows that are held out.

A target has few rows that count more than the rest. Held-out rows are chosen by a hash of their text, their place in
[0, 1) (ours). Rows with the same text have the same place, and a row keeps its place if others are added, moved to
another file or shuffled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path

from siftune.base.text import file_of, short_names
from siftune.data.rows import Row, row_texts

SOURCE = "source"  # optional column with the origin of a row
TARGET = "target"  # its value in rows of a target
OTHER = "other"  # its value if a row has none
_MOST = 7  # repetitions of a row of the target (ours)


def with_target(rows: Sequence[Row], target: Sequence[Row], share: float) -> list[Row]:
    """Put a target's rows after the others, repeated until they are a share of all rows.

    Each comes 1 to 7 times, all equally often up to one. Their column `source` is "target".

    Args:
        rows: The other training rows.
        target: Rows of the target.
        share: Share of all rows for the target's, below 1; 0 leaves them out.

    Example:
        >>> from siftune.data.rows import rows_from
        >>> few, many = rows_from([{"prompt": "2+2=", "completion": "4"}]), rows_from([{"text": "Once."}] * 6)
        >>> len(with_target(many, few, 0.25))
        8
    """
    if not share:
        return list(rows)
    marked = [replace(row, extra={**row.extra, SOURCE: TARGET}, of_target=True) for row in target]
    return [*rows, *(marked[place % len(marked)] for place in range(repeats(len(rows), len(target), share)))]


def repeats(others: int, target: int, share: float) -> int:
    """Return the number of a target's rows after `with_target` repeated them."""
    return min(max(round(others * share / (1 - share)), target), _MOST * target)


def sources(rows: Sequence[Row]) -> list[str]:
    """Return the column `source` of rows, or "other" if it is missing or empty."""
    return [_source(row, OTHER) for row in rows]


def source_or_file(rows: Sequence[Row]) -> list[str]:
    """Return the column `source` of rows, or the name of the file that they are in, with folders to distinguish it."""
    files = [file_of(row.origin) for row in rows]
    paths = [*dict.fromkeys(files)]
    names = dict(zip(paths, short_names([Path(path) for path in paths]), strict=True))
    return [_source(row, names[file]) for row, file in zip(rows, files, strict=True)]


def _source(row: Row, default: str) -> str:
    source = row.extra.get(SOURCE)
    return default if source in (None, "") else str(source)


def held_out(rows: Sequence[Row], share: float, trained: Iterable[Row] = ()) -> tuple[list[Row], list[Row]]:
    """Split off rows for evaluation: those whose place is below a share.

    Args:
        rows: The rows.
        share: Share of them to hold out, in [0, 1); the exact number is random, as if drawn.
        trained: Rows that are trained on in any case; rows with the same text are not held out.

    Returns:
        The others, and the held-out rows, each in their order; rows with the same text are together.

    Example:
        >>> from siftune.data.rows import rows_from
        >>> rows = rows_from({"text": f"row {i}"} for i in range(1000))
        >>> [len(part) for part in held_out(rows, 0.05)]
        [953, 47]
    """
    excluded = set(row_texts(trained))
    texts, places = row_texts(rows), _places(rows)
    out = [place < share and text not in excluded for text, place in zip(texts, places, strict=True)]
    return [row for row, is_out in zip(rows, out, strict=True) if not is_out], list(compress(rows, out))


def _places(rows: Sequence[Row]) -> list[float]:
    """Compute places of rows in [0, 1) from their texts."""
    digests = (hashlib.sha256(b"held out\0" + row).digest() for row in row_texts(rows))
    return [int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]
