"""Decoys: prompts with the completions of rows that have the most similar prompts.

A wrong answer is rarely an answer to another kind of question. Completions of random rows are easier to tell from
correct ones than real errors are; those of the nearest prompts are about as hard (ours). Prompts are compared by
their bytes: cosines of counts of byte trigrams, weighted by rarity, which needs no model and no language.

Shapes: R rows, C candidates, F features.
"""

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from siftune.data.rows import Row
from siftune.records.rows import text_of

DECOYS = 2  # of each row (ours)
_FEATURES = 4096
_CANDIDATES = 4096  # rows that each row is compared with, at most (ours)
_NEAREST = 64  # candidates among which another completion must be (ours)
_AT_ONCE = 1024  # rows compared at a time


def decoys_of(rows: Sequence[Row], seed: int) -> NDArray[np.int64]:
    """Choose the rows whose completions serve as decoys; (R, 2) their numbers, -1 where there is none.

    The completions of a row's decoys differ from its own and, if there are others among the nearest rows, from each
    other. Plain texts have no prompts to compare, and get none.

    Args:
        rows: The rows.
        seed: Of the choice of candidates among many rows.

    Example:
        >>> from siftune.data.rows import rows_from
        >>> pairs = [("red apple?", "fruit"), ("green apple?", "fruit"), ("green bean?", "vegetable")]
        >>> decoys_of(rows_from({"prompt": prompt, "completion": completion} for prompt, completion in pairs), seed=0)
        array([[ 2, -1],
               [ 2, -1],
               [ 1,  0]])
    """
    chosen_RD = np.full((len(rows), DECOYS), -1)
    asked = [at for at, row in enumerate(rows) if row.prompt]
    candidates = sorted(random.Random(f"decoys {seed}").sample(asked, min(len(asked), _CANDIDATES)))
    counts_CF = _counts([text_of(rows[at]).prompt for at in candidates])
    rarity_F = np.log((1 + len(candidates)) / (1 + (counts_CF > 0).sum(0)))
    candidates_CF = _weighted(counts_CF, rarity_F)
    for start in range(0, len(asked), _AT_ONCE):
        chunk = asked[start : start + _AT_ONCE]
        similar_RC = _weighted(_counts([text_of(rows[at]).prompt for at in chunk]), rarity_F) @ candidates_CF.T
        nearest_RC = np.argsort(-similar_RC, axis=1, kind="stable")[:, :_NEAREST]
        for at, nearest in zip(chunk, nearest_RC, strict=True):
            own, others = rows[at].completion.strip(), [candidates[place] for place in nearest]
            others = [other for other in others if rows[other].completion.strip() != own]
            first = {rows[other].completion.strip(): other for other in reversed(others)}  # the nearest with each
            chosen = sorted(others, key=lambda other: first[rows[other].completion.strip()] != other)[:DECOYS]
            chosen_RD[at, : len(chosen)] = chosen
    return chosen_RD


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
    return np.asarray(weighted_RF / np.maximum(lengths_R1, 1e-6), np.float32)
