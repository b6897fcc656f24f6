"""Metrics of scores that detect bad rows.

Shapes: R rows.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def ranks(values: Floats) -> Floats:
    """Ranks from 1, equal values sharing the mean of theirs; (R,)."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[place]


def auroc(scores: Floats, bad: Bools) -> float:
    """The chance that a bad row scores above a good one, ties counting a half."""
    many = int(bad.sum())
    return float((ranks(scores)[bad].sum() - many * (many + 1) / 2) / (many * (len(bad) - many)))


def average_precision(scores: Floats, bad: Bools) -> float:
    """Mean over the bad rows of the precision at each; rows of equal scores are taken together."""
    order = np.argsort(-scores, kind="stable")
    sorted_scores, hits = scores[order], bad[order].astype(float)
    ends = np.flatnonzero(np.append(np.diff(sorted_scores) != 0, True))
    found = np.cumsum(hits)[ends]
    gained = np.diff(found, prepend=0.0)
    return float((gained * found / (ends + 1)).sum() / bad.sum())


def precision(scores: Floats, bad: Bools) -> float:
    """Share of bad rows among as many of the highest scores as there are bad rows; of ties the fair part."""
    count = int(bad.sum())
    least = np.sort(scores)[-count]
    above, tied = scores > least, scores == least
    return float((bad[above].sum() + (count - above.sum()) * bad[tied].mean()) / count)


def all_of(scores: Floats, bad: Bools) -> dict[str, float]:
    """The three, rounded; a score that is no number counts as the lowest."""
    known = np.where(np.isnan(scores), -np.inf, scores)
    made = {"auroc": auroc, "ap": average_precision, "precision": precision}
    return {name: round(of(known, bad), 4) for name, of in made.items()}


def named(scores: Floats, bad: Bools, least: float) -> dict[str, int]:
    """Number of rows with at least this score, and of the bad rows among them."""
    chosen = scores >= least
    return {"rows": int(chosen.sum()), "bad": int(bad[chosen].sum())}


def interval(values: Sequence[float], resamples: int = 4000) -> tuple[float, float]:
    """95 % interval of a mean over seeds, by bootstrap; equal to the mean where there is one seed."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.asarray(values), (resamples, len(values))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)
