"""Which rows come how often, and which are held out: by what they say, so that other rows have no part in it.

A row's place in [0, 1) is a hash of what it says. Rows that say the same have the same place, and a row keeps its place
when others are added, moved to another file or shuffled (ours).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import compress

from siftune.data.rows import Row, said


def held_out(rows: Sequence[Row], share: float, trained: Iterable[Row] = ()) -> tuple[list[Row], list[Row]]:
    """Split off rows to measure on: those whose place is below a share.

    Args:
        rows: The rows.
        share: Share of them to hold out, in [0, 1): what it comes to differs by chance, as if drawn.
        trained: Rows that are trained on in any case: what they say is not held out.

    Returns:
        The others, and those held out, each in their order; rows that say the same are together.

    Example:
        >>> from siftune.data.rows import rows_from
        >>> rows = rows_from({"text": f"row {i}"} for i in range(1000))
        >>> [len(part) for part in held_out(rows, 0.05)]
        [953, 47]
    """
    known = set(said(trained))
    words, places = said(rows), _places(rows, "held out")
    out = [place < share and words not in known for words, place in zip(words, places, strict=True)]
    return [row for row, is_out in zip(rows, out, strict=True) if not is_out], list(compress(rows, out))


def _places(rows: Sequence[Row], use: str) -> list[float]:
    """Places of rows in [0, 1), others for every use."""
    digests = (hashlib.sha256(use.encode() + b"\0" + row).digest() for row in said(rows))
    return [int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]
