"""Near-duplicates: rows that share most of their rare shingles.

Texts are compared by their shingles, runs of eight bytes, in lower case and with single spaces: the number of shared
shingles over all (Broder, "On the resemblance and containment of documents", 1997). Shingles of many rows,
such as those of a template, are ignored (ours). Of large data a fixed part of all shingles is used, the same for every
text, which keeps the expected share (FracMinHash, Irber et al. 2022); candidates are then compared completely. Texts
without a shingle in this part are found only if they are equal.

Eight bytes are a 64-bit number, so nothing is hashed, and the share is exact if all shingles are used. This takes a few
sorts in numpy. MinHash libraries sign one text after another in Python, and estimate the share; edit distances, as of
rapidfuzz, call rows of one template alike.

Shapes: N texts, W shingles, one for each text that has it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

ALIKE = 0.8  # share of shingles from which two rows are near-duplicates
_COMMON, _LEAST = 0.05, 10  # a shingle of more than 5 % of the rows, and of more than ten, is ignored
_MOST = 2**22  # shingles to use, approximately
_ROUGHLY = 0.2  # error of a share by few shingles
_CHUNK = 2**22  # bytes of text at a time
_BYTES = 8
_MIX = np.uint64(0x9E3779B97F4A7C15)

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]


class Twins:
    """Finds near-duplicates among texts.

    Args:
        texts: (N,) texts.

    Example:
        >>> twins = Twins(["Name the capital of France. Paris", "name the capital of  France. Paris!", "2 + 2? 4"])
        >>> twins.of(0), twins.of(2)
        ([1], [])
    """

    def __init__(self, texts: Sequence[str]) -> None:
        plain = [" ".join(text.lower().split()).encode() for text in texts]
        self._equal: dict[bytes, list[int]] = {}
        for number, text in enumerate(plain):
            self._equal.setdefault(text, []).append(number)
        self._plain = plain
        skip = max(0, int(np.ceil(np.log2(max(1, sum(map(len, plain))) / _MOST))))
        self._rough = skip > 0
        rows_W, keys_W = _shingles(plain, skip)
        order = np.argsort(keys_W, kind="stable")
        keys_W, self._rows = keys_W[order], rows_W[order]
        starts = np.flatnonzero(np.concatenate([[True], keys_W[1:] != keys_W[:-1]])) if len(keys_W) else order
        counts = np.diff(np.append(starts, len(keys_W)))
        rare = counts <= max(_LEAST, _COMMON * len(texts))
        self._starts, self._counts = starts[rare], counts[rare]
        member = np.repeat(np.flatnonzero(rare), self._counts)
        own = self._rows[np.repeat(rare, counts)]
        by_row = np.argsort(own, kind="stable")
        self._shingles = np.searchsorted(
            np.flatnonzero(rare), member[by_row]
        )  # of each row, by their places in _starts
        self._sizes = np.bincount(own, minlength=len(texts))
        self._ends = np.cumsum(self._sizes)

    def of(self, number: int) -> list[int]:
        """Numbers of the near-duplicates of a text, ascending."""
        same = set(self._equal[self._plain[number]])
        size, end = self._sizes[number], self._ends[number]
        if size:
            shingles = self._shingles[end - size : end]
            shared = [self._rows[self._starts[at] : self._starts[at] + self._counts[at]] for at in shingles]
            others, both = np.unique(np.concatenate(shared), return_counts=True)
            alike = both / (size + self._sizes[others] - both) >= ALIKE - _ROUGHLY * self._rough
            same |= {other for other in others[alike].tolist() if not self._rough or self._shared(number, other)}
        return sorted(same - {number})

    def _shared(self, one: int, other: int) -> bool:
        """Whether two texts share enough of all their shingles."""
        first, second = (set(_of_chunk(0, [self._plain[at]], 0)[1].tolist()) for at in (one, other))
        return len(first & second) >= ALIKE * len(first | second)


def _shingles(texts: Sequence[bytes], skip: int) -> tuple[Ints, Keys]:
    """Numbers of texts and their shingles, each once per text; (W,) both. One in 2^skip is used."""
    parts = [_of_chunk(first, chunk, skip) for first, chunk in _chunks(texts)]
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    rows, keys = zip(*parts, strict=True)
    return np.concatenate(rows), np.concatenate(keys)


def _chunks(texts: Sequence[bytes]) -> Iterator[tuple[int, Sequence[bytes]]]:
    """Texts in chunks of a few megabytes, with the number of the first."""
    first = size = 0
    for number, text in enumerate(texts):
        size += len(text)
        if size >= _CHUNK or number == len(texts) - 1:
            yield first, texts[first : number + 1]
            first, size = number + 1, 0


def _of_chunk(first: int, texts: Sequence[bytes], skip: int) -> tuple[Ints, Keys]:
    """Shingles of some texts; a shorter text is one shingle, padded with zeros."""
    padding = bytes(_BYTES - 1)
    data = np.frombuffer(padding.join(texts) + padding, dtype=np.uint8).astype(np.uint64)
    count = len(data) - len(padding)
    keys = np.zeros(count, np.uint64)
    for place in range(_BYTES):
        keys = (keys << np.uint64(8)) | data[place : place + count]
    lengths = np.array([len(text) for text in texts])
    wide = lengths + len(padding)
    rows = np.repeat(np.arange(first, first + len(texts)), wide)[:count]
    ends = np.repeat(np.cumsum(wide) - wide + np.maximum(1, lengths - len(padding)), wide)[:count]
    used = np.arange(count) < ends
    if skip:
        used &= (keys * _MIX) >> np.uint64(64 - skip) == 0
    rows, keys = rows[used], keys[used]
    order = np.lexsort((keys, rows))
    rows, keys = rows[order], keys[order]
    fresh = np.concatenate([[True], (rows[1:] != rows[:-1]) | (keys[1:] != keys[:-1])])[: len(rows)]
    return rows[fresh], keys[fresh]
