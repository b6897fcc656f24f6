"""Every score of a run's rows, larger for rows that are more likely bad.

    loss            at first sight
    z               … by time, as `siftune.records.scores` has it
    row             mean over visits of the same, siftune's default; z where each row is seen once
    local-z         … in deviations of its own time, not of all: how far losses spread falls as rows are learned
    source          `row` among the rows of the same source, as `siftune rows` has it; of pools with several
    rank            … its rank among the rows of its step
    margin          minus the margin at first sight: see `watch.py`
    base            loss of the base, which needs no training
    excess          loss at first sight minus that of the base; `excess-z` by time
    norm            length of the gradient at first sight; `norm-z` by time
    inner, cosine, mean, one    minus these alignments at first sight: see `watch.py`
    joined          ranks of z and of minus `mean` in the step, added up
    twins           near-duplicates that a row has
    last-loss, mean-loss, aum, variability, forgetting, mean-alignment      over all visits

AUM is the area under the margin (Pleiss et al., NeurIPS 2020): here minus the mean margin over visits.

Shapes: V visits in the order of steps, R rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from siftune.records.rows import Text
from siftune.records.scores import by_row, by_time, course, seen, usual
from siftune.records.visits import Visits
from siftune.suspects.twins import Twins

Floats = NDArray[np.float64]
_AROUND = 64  # visits whose deviation is that of a time
ALIGNMENTS = ("inner", "cosine", "mean", "one")


def all_scores(
    visits: Visits,
    watched: Mapping[str, Floats],
    base: Floats,
    texts: Sequence[Text],
    sources: NDArray[np.integer] | None = None,
) -> dict[str, Floats]:
    """Score the rows that were seen, in the order of their numbers.

    Args:
        visits: What was recorded.
        watched: What was watched besides, in the same order of visits.
        base: (R,) the base's loss of every row, seen or not.
        texts: What each says.
        sources: (R,) a number for the source of each; None: they have one.
    """
    if not (np.array_equal(visits.row, watched["row"]) and np.array_equal(visits.step, watched["step"])):
        raise ValueError("what was recorded and what was watched are of other visits")
    gathered = seen(visits.row)
    first, rows = gathered.first, gathered.rows
    loss, z = visits.loss.astype(np.float64), by_time(visits.loss, visits.step).astype(np.float64)
    found = {"loss": loss[first], "row": by_row(visits.row, loss, visits.step), "z": z[first]}
    found |= {"rank": by_rank(loss, visits.step)[first], "base": base[rows]}
    if sources is not None:
        found["source"] = by_row(visits.row, loss, visits.step, sources[visits.row])
    found["local-z"] = by_own_deviation(loss - usual(loss, visits.step))[first]
    found["excess"] = loss[first] - base[rows]
    found["excess-z"] = by_time(loss - base[visits.row], visits.step)[first].astype(np.float64)
    found |= {"margin": -watched["margin"][first], "norm": watched["norm"][first]}
    found["norm-z"] = by_time(watched["norm"], visits.step)[first].astype(np.float64)
    found |= {name: -watched[name][first] for name in ALIGNMENTS}
    found["joined"] = (by_rank(z, visits.step) + by_rank(-watched["mean"], visits.step))[first]
    twins = Twins([f"{text.prompt}\n{text.completion}" for text in texts])
    found["twins"] = np.array([len(twins.of(int(row))) for row in rows], dtype=np.float64)
    return {**found, **over_visits(visits, watched, z)}


def over_visits(visits: Visits, watched: Mapping[str, Floats], z: Floats) -> dict[str, Floats]:
    """Scores that take all visits of a row; none where each was seen once."""
    if seen(visits.row).visits.max() < 2:
        return {}
    found = course(visits.row, visits.loss, z)
    last = seen(visits.row[::-1]).first
    means = {name: course(visits.row, watched[name], z).mean for name in ("margin", "mean")}
    scores: dict[str, Any] = {"mean-loss": found.mean, "variability": found.variability, "forgetting": found.forgetting}
    scores |= {"aum": -means["margin"], "mean-alignment": -means["mean"]}
    return {**scores, "last-loss": visits.loss[::-1][last].astype(np.float64)}


def by_own_deviation(apart: Floats, around: int = _AROUND) -> Floats:
    """Distances from what was usual, divided by the median one of N visits around each; (V,), in time's order."""
    starts = np.clip(np.arange(len(apart)) - around // 2, 0, max(0, len(apart) - around))
    usual = np.array([1.4826 * np.median(np.abs(apart[start : start + around])) for start in starts])
    return apart / np.maximum(usual, 1e-6)


def by_rank(values: NDArray[np.floating], steps: NDArray[np.integer]) -> Floats:
    """Rank of every value among those of its step, from 0 to 1; (V,)."""
    found = np.zeros(len(values))
    for step in np.unique(steps):
        own = np.flatnonzero(steps == step)
        found[own] = np.argsort(np.argsort(values[own], kind="stable"), kind="stable") / max(1, len(own) - 1)
    return found
