"""Loss above the usual loss at that time: the score of siftune 0.1, as a rival.

A row's score is its loss above the median of its step or, below 256 visits, of the steps around it. It is the mean over
visits, in robust deviations of the complete run (1.4826 times the median distance). Rows of 3 or more were suspect.
Rows may be compared within kinds. A kind with few rows per step is compared with most of the run, while its loss falls
within a few steps: early rows of an easy kind then stand out, and wrong ones do not.

Shapes: V visits in the order of steps, R rows.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

WINDOW = 256  # visits to compare with, at least
LEAST = 3.0  # deviations from which a row was a suspect

Floats = NDArray[np.float64]


def by_row(
    rows: NDArray[np.integer], losses: NDArray[np.floating], steps: NDArray[np.integer], kinds: NDArray[np.integer]
) -> Floats:
    """Score every row, in the order of the rows' numbers; (R,). All arguments (V,)."""
    apart = np.empty(len(rows))
    for kind in np.unique(kinds):
        own = kinds == kind
        apart[own] = losses[own] - usual(losses[own].astype(np.float64), steps[own])
    numbers, first, places = np.unique(rows, return_index=True, return_inverse=True)
    means = np.bincount(places, apart) / np.bincount(places)
    for kind in np.unique(kinds):
        own = kinds[first] == kind
        means[own] /= max(1.4826 * float(np.median(np.abs(means[own]))), 1e-6)
    assert len(numbers) == len(means)
    return means


def usual(losses: Floats, steps: NDArray[np.integer]) -> Floats:
    """Median loss at the time of each visit; (V,)."""
    result = np.empty(len(losses))
    begins = np.append(np.flatnonzero(np.diff(steps, prepend=-1)), len(losses))
    for begin, end in itertools.pairwise(begins):
        sides = -(-max(0, WINDOW - int(end - begin)) // 2)
        low, high = steps[max(0, begin - sides)], steps[min(len(losses), end + sides) - 1]
        result[begin:end] = np.median(losses[(steps >= low) & (steps <= high)])
    return result
