"""Metrics of scores that detect bad rows.

Shapes: R rows.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]


def lowest(scores: Floats) -> Floats:
    """Scores in which NaN is the lowest."""
    return np.where(np.isnan(scores), -np.inf, scores)


def auroc(scores: Floats, bad: Bools) -> float:
    """The chance that a bad row scores above a good one, ties counting a half."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = ((last - counts + 1 + last) / 2)[place]  # from 1; equal scores share the mean
    many = int(bad.sum())
    return float((ranks[bad].sum() - many * (many + 1) / 2) / (many * (len(bad) - many)))


def precision(scores: Floats, bad: Bools) -> float:
    """Share of bad rows among as many of the highest scores as there are bad rows; of ties the fair part."""
    count = int(bad.sum())
    least = np.sort(scores)[-count]
    above, tied = scores > least, scores == least
    return float((bad[above].sum() + (count - above.sum()) * bad[tied].mean()) / count)
