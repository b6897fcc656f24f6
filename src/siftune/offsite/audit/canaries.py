"""Canaries: secrets of our own that are put among the training rows, to see what comes out again.

Carlini et al., "The secret sharer", USENIX Security 2019, arXiv 1802.08232. A canary is a row with a random code; it
stands among the training rows once, twice, four times, … After tuning, the rank of its loss among rows that differ from
it by the code alone, and were not trained on, tells how far it stands out:

    exposure = log₂ |ℛ| − log₂ rank        ℛ the canary and the other codes; rank 1 is the least loss

With r other codes it is from 0 to log₂(r + 1); a canary that was not learned has a rank that is uniform, and so an
exposure of log₂ e = 1.44 bits on average, at most. *Verbatim* says that greedy decoding after the prompt gives the
code to its end: that every label token is the likeliest one after those before it.

Ours: codes are of eight digits in two groups; every canary has a prompt of its own, so that they do not compete.

Shapes: C canaries, R other codes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from siftune.data.rows import Row, rows_from
from siftune.evaluate.bootstrap import Bootstrap, Estimate, Floats, accuracy_interval, resample

REPEATS = (0, 1, 4, 16)  # those of the first group are not trained on at all: what exposure is then


@dataclass(frozen=True)
class CanaryGroup:
    """Canaries that stood among the training rows equally often."""

    repeats: int
    canaries: int
    exposure: Estimate  # the mean, in bits
    verbatim: Estimate  # share that greedy decoding completes


@dataclass(frozen=True)
class Canaries:
    """What came out again."""

    groups: tuple[CanaryGroup, ...]  # from the fewest repeats up; the first was not trained on at all
    most: float  # the highest exposure that could have been seen, in bits


def make_canaries(count: int, references: int, seed: int) -> list[list[Row]]:
    """Draw C canaries: of each the row to train on, and then the same row with R other codes."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        codes = rng.sample(range(10**8), references + 1)
        prompt = f"The access code of locker {number + 1} is"
        records = [{"prompt": prompt, "completion": f" {code // 10**4:04d} {code % 10**4:04d}"} for code in codes]
        made.append(rows_from(records))
    return made


def exposure(canary: float, others: ArrayLike) -> float:
    """Exposure in bits of a canary's loss among those of other codes; ties take the middle rank."""
    losses = np.asarray(others, dtype=np.float64)
    rank = 1 + float((losses < canary).sum()) + float((losses == canary).sum()) / 2
    return float(np.log2(len(losses) + 1) - np.log2(rank))


def group(repeats: int, exposures: Sequence[float], verbatim: Floats, bootstrap: Bootstrap) -> CanaryGroup:
    """Sum up canaries that were repeated equally often, by their exposures in bits and whether they were completed.

    The interval of the exposure is the bootstrap's, that of the share Wilson's.
    """
    mean = resample({"exposure": exposures}, None, bootstrap).mean("exposure")
    share = Estimate(float(verbatim.mean()), *accuracy_interval(verbatim, bootstrap.level))
    return CanaryGroup(repeats, len(verbatim), mean, share)
