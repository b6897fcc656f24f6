"""Decoys: prompts with the completions of rows that have the most similar prompts.

A wrong answer is rarely an answer to another kind of question. Completions of random rows are easier to tell from
correct ones than real errors are; those of the nearest prompts are about as hard (ours). Prompts are compared by
their bytes: cosines of counts of byte trigrams, weighted by rarity, which needs no model and no language.

Shapes: R rows, C candidates, F features.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from siftune.data.rows import Row, text_of

SHARED = 0.5  # of the rows are covered, at least, if rows share a few answers (ours; measured: 0.96 to 1, or 0 to 0.35)
_FEWEST, _MOST = 2, 8  # decoys of each row (ours)
_CHARACTERS = 256  # of a row's decoys, so that long answers do not multiply the time (ours)
_FEATURES = 4096
_CANDIDATES = 4096  # rows that each row is compared with, at most (ours)
_NEAREST = 64  # candidates among which another completion must be (ours)
_AT_ONCE = 1024  # rows compared at a time


class Decoys(NamedTuple):
    """Rows whose completions serve as decoys.

    Attributes:
        numbers: (R, D) int64 numbers of the rows; -1 where there is none.
        covered: (R,) bool, whether the row's own completion is among as many that are nearest to it, in other rows. If
            this is so in a share of `SHARED`, there are few answers, and the decoys of a wrong row include the right
            one.
    """

    numbers: NDArray[np.int64]
    covered: NDArray[np.bool_]


def decoys_of(
    rows: Sequence[Row], seed: int, numbers: Sequence[int] | None = None, candidates: Sequence[int] | None = None
) -> Decoys:
    """Choose the rows whose completions serve as decoys.

    A row gets 8 decoys, or fewer, but at least 2, if answers have more than 32 characters on average. Their completions
    differ from its own and from each other. Plain texts have no prompts to compare, and get none.

    Args:
        rows: The rows.
        seed: Of the choice of candidates among many rows.
        numbers: Numbers of the rows that get decoys; None: all.
        candidates: Numbers of the rows that may serve; None: all.

    Example:
        >>> from siftune.data.rows import rows_from
        >>> pairs = [("red apple?", "fruit"), ("green apple?", "fruit"), ("green bean?", "vegetable")]
        >>> rows = rows_from({"prompt": prompt, "completion": completion} for prompt, completion in pairs)
        >>> decoys = decoys_of(rows, seed=0)
        >>> decoys.numbers[:, 0].tolist(), decoys.covered.tolist()
        ([2, 2, 1], [True, True, False])
    """
    every = range(len(rows))
    asked, likely = (
        [at for at in (every if part is None else part) if rows[at].prompt] for part in (numbers, candidates)
    )
    serving = sorted(random.Random(f"decoys {seed}").sample(likely, min(len(likely), _CANDIDATES)))
    characters = sum(len(rows[at].completion) for at in serving) / max(len(serving), 1)
    count = int(np.clip(_CHARACTERS / max(characters, 1), _FEWEST, _MOST))
    chosen_RD, covered_R = np.full((len(rows), count), -1), np.zeros(len(rows), bool)
    if not serving:
        return Decoys(chosen_RD, covered_R)
    counts_CF = _counts([text_of(rows[at]).prompt for at in serving])
    rarity_F = np.log((1 + len(serving)) / (1 + (counts_CF > 0).sum(0)))
    serving_CF = _weighted(counts_CF, rarity_F)
    for start in range(0, len(asked), _AT_ONCE):
        chunk = asked[start : start + _AT_ONCE]
        similar_RC = _weighted(_counts([text_of(rows[at]).prompt for at in chunk]), rarity_F) @ serving_CF.T
        for at, nearest in zip(chunk, _highest(similar_RC), strict=True):
            own, nearest_with = rows[at].completion.strip(), dict[str, int]()
            for other in (serving[place] for place in nearest if serving[place] != at):
                nearest_with.setdefault(rows[other].completion.strip(), other)
            covered_R[at] = own in [*nearest_with][: count + 1]
            chosen = [other for answer, other in nearest_with.items() if answer != own][:count]
            chosen_RD[at, : len(chosen)] = chosen
    return Decoys(chosen_RD, covered_R)


def _highest(similar_RC: NDArray[np.float32]) -> NDArray[np.int64]:
    """Places of the nearest candidates, the nearest first, and of equal ones the first; (R, 64) or fewer."""
    count = min(_NEAREST, similar_RC.shape[1])
    some = np.sort(np.argpartition(-similar_RC, count - 1, axis=1)[:, :count], axis=1)
    order = np.argsort(-np.take_along_axis(similar_RC, some, 1), axis=1, kind="stable")
    return np.take_along_axis(some, order, 1)


def _counts(texts: Sequence[str]) -> NDArray[np.float32]:
    """Damped counts of byte trigrams by hash; (R, F)."""
    counts_RF = np.zeros((len(texts), _FEATURES), np.float32)
    for counts_F, text in zip(counts_RF, texts, strict=True):
        codes = np.frombuffer(f" {text.lower()} ".encode(), np.uint8).astype(np.int64)
        trigrams = (codes[:-2] * 65_599 + codes[1:-1]) * 65_599 + codes[2:]
        counts_F[:] = np.log1p(np.bincount(trigrams % 1_000_003 % _FEATURES, minlength=_FEATURES))
    return counts_RF


def _weighted(counts_RF: NDArray[np.float32], rarity_F: NDArray[np.float64]) -> NDArray[np.float32]:
    weighted_RF = counts_RF * rarity_F.astype(np.float32)
    lengths_R1 = np.linalg.norm(weighted_RF, axis=1, keepdims=True)
    weighted_RF /= np.maximum(lengths_R1, 1e-6)  # in place: these are the largest arrays here
    return weighted_RF
