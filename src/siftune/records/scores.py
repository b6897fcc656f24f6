"""Scores of recorded rows: high for rows that may be wrong.

A row's loss at its first visit is out of sample, since nothing has been learned from the row: the detector that others
have to beat (Chong et al., "Detecting Label Errors by using Pre-Trained Language Models", EMNLP 2022). All losses fall
during training, so an early row looks worse than a late one; the usual loss at that time is subtracted (ours). The
spread of losses falls too, and is not divided out: otherwise correct rows that are not learned yet would look as bad as
wrong ones.

If rows are seen several times, the mean over visits says more than the first (`by_row`): wrong rows are learned last.

Further scores over epochs:

    mean loss             mean over visits
    variability           standard deviation over visits; with the mean, a row's place on a data map (Swayamdipta et
                          al., "Dataset Cartography", EMNLP 2020)
    forgetting            number of rises of the loss, by `by_time`, by a deviation from one visit to the next (after
                          Toneva et al., ICLR 2019, who count correct answers that become wrong; the loss is ours)

Shapes: V visits in the order of steps, R rows.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WINDOW = 256  # visits to compare with, at least: the median of few says little
_EQUAL = 1e-6  # losses that differ by less are equal

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def usual(values: NDArray[np.floating], steps: NDArray[np.integer], kinds: NDArray[np.integer] | None = None) -> Floats:
    """Median of the values at the same time as each visit; (V,), NaN without values.

    A visit is compared with those of its step and, below 256 visits, with those of the steps around it (ours).

    Args:
        values: (V,).
        steps: (V,) ascending.
        kinds: (V,) kind of each visit's row, to compare rows of one kind only.
    """
    wide, times = np.asarray(values, dtype=np.float64), np.asarray(steps)
    result = np.full(len(wide), np.nan)
    for own in _each(kinds, len(wide)):
        result[own] = _usual(wide[own], times[own])
    return result


def _usual(values: Floats, steps: NDArray[np.integer]) -> Floats:
    result = np.full(len(values), np.nan)
    first, last = _windows(steps, len(values))
    begins = np.append(np.flatnonzero(np.diff(steps, prepend=-1)), len(values))
    for begin, end in itertools.pairwise(begins):
        among = values[first[begin] : last[begin]]
        among = among[~np.isnan(among)]
        result[begin:end] = np.median(among) if len(among) else np.nan
    return result


def _each(kinds: NDArray[np.integer] | None, count: int) -> Iterator[NDArray[np.bool_]]:
    """Mask of each kind."""
    if kinds is None:
        yield np.ones(count, dtype=np.bool_)
    else:
        yield from (kinds == kind for kind in np.unique(kinds))


def deviation(apart: Floats) -> float:
    """Robust standard deviation: 1.4826 times the median distance, or 1.2533 times the mean distance if that is 0.

    Wrong rows would move mean and standard deviation themselves. The mean distance replaces the median if more than
    half of the values are equal. 0 if all are equal, or there are none.
    """
    distances = np.abs(apart[~np.isnan(apart)])
    if not len(distances):
        return 0.0
    sizes = (float(1.4826 * np.median(distances)), float(1.2533 * distances.mean()))
    return next((size for size in sizes if size > _EQUAL), 0.0)


def _in_deviations(apart: Floats, kinds: NDArray[np.integer] | None) -> Floats:
    result = 0 * apart
    for own in _each(kinds, len(apart)):
        if size := deviation(apart[own]):
            result[own] = apart[own] / size
    return result


def by_time(
    values: NDArray[np.floating], steps: NDArray[np.integer], kinds: NDArray[np.integer] | None = None
) -> NDArray[np.float32]:
    """Values in deviations above the usual value at that time, with one deviation for all times; (V,) float32.

    0 if all are equal, NaN for a NaN. Arguments as for `usual`.

    Example:
        >>> by_time(np.array([1.0, 1.5, 2.0, 9.0]), np.array([0, 0, 1, 1])).round(1)
        array([-1. , -0.3,  0.3,  9.8], dtype=float32)
    """
    return _in_deviations(np.asarray(values, dtype=np.float64) - usual(values, steps, kinds), kinds).astype(np.float32)


def by_row(
    rows: NDArray[np.integer],
    values: NDArray[np.floating],
    steps: NDArray[np.integer],
    kinds: NDArray[np.integer] | None = None,
) -> Floats:
    """Mean loss of rows above the usual loss, over their visits, in deviations of these means; (R,).

    With one visit each, the same as `by_time`. NaN if every value of a row is NaN.

    Args:
        rows: (V,) row of each visit.
        values: (V,).
        steps: (V,) ascending.
        kinds: As for `usual`; a row is of one kind.

    Returns:
        In the order of `seen(rows).rows`.
    """
    gathered = seen(rows)
    means = means_of(rows, np.asarray(values, dtype=np.float64) - usual(values, steps, kinds))
    return _in_deviations(means, None if kinds is None else kinds[gathered.first])


def means_of(rows: NDArray[np.integer], values: Floats) -> Floats:
    """Mean over the visits of every row, ignoring NaN; (R,)."""
    _, place = np.unique(rows, return_inverse=True)
    valid = ~np.isnan(values)
    sums, counts = (np.bincount(place, weights) for weights in (np.where(valid, values, 0.0), valid.astype(float)))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _windows(steps: NDArray[np.integer], count: int) -> tuple[Ints, Ints]:
    """First and last visit, in complete steps, that each visit is compared with."""
    starts, ends = np.searchsorted(steps, steps, "left"), np.searchsorted(steps, steps, "right")
    if not count:
        return starts, ends
    short = np.maximum(0, WINDOW - (ends - starts))
    sides = -(-short // 2)
    low, high = np.maximum(0, starts - sides), np.minimum(count, ends + sides)
    first = np.searchsorted(steps, steps[low], "left")
    last = np.searchsorted(steps, steps[high - 1], "right")
    return first, last


class Seen(NamedTuple):
    """Visits gathered by row; R rows.

    Attributes:
        rows: (R,) numbers of the rows, ascending.
        first: (R,) index of each row's first visit.
        visits: (R,) number of visits.
    """

    rows: Ints
    first: Ints
    visits: Ints


def seen(rows: NDArray[np.integer]) -> Seen:
    """Gather visits by row.

    Args:
        rows: (V,) row of each visit, in the order of time.
    """
    numbers, first, counts = np.unique(rows, return_index=True, return_counts=True)
    return Seen(numbers.astype(np.int64), first, counts)


class Course(NamedTuple):
    """Losses of rows over epochs; each (R,), in the order of `seen(rows).rows`.

    Attributes:
        mean: Mean loss over visits.
        variability: Standard deviation over visits.
        forgetting: Number of visits after which the loss, by `by_time`, rose by a deviation.
    """

    mean: Floats
    variability: Floats
    forgetting: Floats


def course(rows: NDArray[np.integer], losses: NDArray[np.floating], z: NDArray[np.floating]) -> Course:
    """Losses of rows over their visits; all (V,), in the order of time."""
    order = np.argsort(rows, kind="stable")
    own, wide = rows[order], losses[order].astype(np.float64)
    starts = np.flatnonzero(np.concatenate([[True], own[1:] != own[:-1]]))
    counts = np.diff(np.append(starts, len(own)))
    mean = means_of(rows, losses.astype(np.float64))
    apart = np.add.reduceat((wide - np.repeat(mean, counts)) ** 2, starts) / counts
    rose = np.concatenate([[False], np.diff(z[order]) > 1.0])
    rose[starts] = False
    return Course(mean, np.sqrt(apart), np.add.reduceat(rose.astype(np.float64), starts))
