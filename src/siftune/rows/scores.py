"""Scores of rows from what was recorded of them: large for rows that may be wrong.

In one epoch a row's loss at first sight is out of sample, since nothing has been learned from the row: it is the
detector that others have to beat (Chong et al., "Detecting Label Errors by using Pre-Trained Language Models", EMNLP
2022). As training goes on all losses fall, so that an early row looks worse than a late one; `by_time` takes that out
(ours). How far losses spread falls, too, as most rows are learned and some are not, and is left in: divided by it, rows
that are right and not learned yet would look as bad as wrong ones.

Over epochs:

    mean loss             the mean over visits
    variability           its standard deviation over visits; with the mean, a row's place on a data map (Swayamdipta et
                          al., "Dataset Cartography", EMNLP 2020)
    forgetting            how often the loss, as `by_time` has it, rose by a deviation from one visit to the
                          next (after Toneva et al., ICLR 2019, who count right answers that become wrong ones; the loss
                          in their place is ours)

Shapes: V visits in the order of steps, R rows that were seen.
"""

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WINDOW = 256  # visits, at least, that a visit is compared with: what is usual among few says little
_EQUAL = 1e-6  # values that differ by less, relative to their median, are equal

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Company(NamedTuple):
    """What was usual when values were seen; (V,) both.

    Attributes:
        usual: Median of the values seen at the same time.
        deviation: How far from it is usual, the same at all times: 1.4826 times the median distance, which is a
            standard deviation where values are normal, and which few large ones do not move; 1.2533 times the mean
            distance where more than half of the values are equal.
    """

    usual: Floats
    deviation: Floats


def company(
    values: NDArray[np.floating],
    steps: NDArray[np.integer],
    counts: NDArray[np.bool_] | None = None,
    kinds: NDArray[np.integer] | None = None,
) -> Company:
    """What was usual at the time of each visit; NaN where nothing was seen. Arguments are those of `by_time`."""
    wide, known = np.asarray(values, dtype=np.float64), np.asarray(steps)
    found = np.full((2, len(wide)), np.nan)
    for kind in np.unique(kinds) if kinds is not None else [None]:
        own = slice(None) if kind is None else kinds == kind
        found[:, own] = _usual(wide[own], known[own], None if counts is None else counts[own])
    return Company(*found)


def _usual(values: Floats, steps: NDArray[np.integer], counts: NDArray[np.bool_] | None) -> Floats:
    usual = np.full(len(values), np.nan)
    first, last = _windows(steps, len(values))
    begins = np.append(np.flatnonzero(np.diff(steps, prepend=-1)), len(values))
    for begin, end in itertools.pairwise(begins):
        among = _known(values[first[begin] : last[begin]])
        usual[begin:end] = np.median(among) if len(among) else np.nan
    apart = values - usual
    deviation = _deviation(_known(apart if counts is None else apart[counts]), _known(values))
    return np.stack([usual, np.full(len(values), deviation)])


def _known(values: Floats) -> Floats:
    return values[~np.isnan(values)]


def _deviation(apart: Floats, values: Floats) -> float:
    if not len(apart):
        return 0.0
    distances, least = np.abs(apart), _EQUAL * max(1.0, abs(float(np.median(values))))
    sizes = (float(1.4826 * np.median(distances)), float(1.2533 * distances.mean()))
    return next((size for size in sizes if size > least), 0.0)


def by_time(
    values: NDArray[np.floating],
    steps: NDArray[np.integer],
    counts: NDArray[np.bool_] | None = None,
    kinds: NDArray[np.integer] | None = None,
) -> NDArray[np.float32]:
    """Values in deviations above what was usual when they were seen; (V,) float32.

    The median is taken off of the values of a visit's step; where that has fewer than 256 visits, of those of the steps
    around it, too, as many on either side as it takes (ours). The deviation is one for all times. Medians stand in the
    place of mean and standard deviation, as where many rows are wrong these would be theirs. 0 where all are equal, NaN
    where the value is.

    Args:
        values: (V,).
        steps: (V,) ascending.
        counts: (V,) visits whose distances from the median make the deviation, such as those of rows at first sight;
            all if not given.
        kinds: (V,) of what kind each visit's row is, where a row is to be compared with its like alone.

    Example:
        >>> by_time(np.array([1.0, 1.5, 2.0, 9.0]), np.array([0, 0, 1, 1])).round(1)
        array([-1. , -0.3,  0.3,  9.8], dtype=float32)
    """
    usual, deviation = company(values, steps, counts, kinds)
    apart = np.asarray(values, dtype=np.float64) - usual
    return np.where(deviation > 0, apart / np.where(deviation > 0, deviation, 1.0), 0 * apart).astype(np.float32)


def _windows(steps: NDArray[np.integer], count: int) -> tuple[Ints, Ints]:
    """Where the visits begin and end that each is compared with: whole steps."""
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
        rows: (R,) what tells the rows apart, ascending.
        first: (R,) place of each row's first visit among the visits.
        visits: (R,) how often each was seen.
    """

    rows: Ints
    first: Ints
    visits: Ints


def at_first_sight(rows: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which visits are the first of their row; (V,), as `rows`, in the order of time."""
    found = np.zeros(len(rows), dtype=np.bool_)
    found[seen(rows).first] = True
    return found


def seen(rows: NDArray[np.integer]) -> Seen:
    """Gather visits by row.

    Args:
        rows: (V,) whose each visit is, in the order of time.
    """
    found, first, counts = np.unique(rows, return_index=True, return_counts=True)
    return Seen(found.astype(np.int64), first, counts)


class Course(NamedTuple):
    """How rows fared over epochs; each (R,), in the order of `seen(rows).rows`.

    Attributes:
        mean: Mean loss over visits.
        variability: Standard deviation over visits.
        forgetting: Visits before which the loss, as `by_time` has it, had been lower by a deviation.
    """

    mean: Floats
    variability: Floats
    forgetting: Floats


def course(rows: NDArray[np.integer], losses: NDArray[np.floating], z: NDArray[np.floating]) -> Course:
    """Follow rows over their visits; all (V,), in the order of time."""
    order = np.argsort(rows, kind="stable")
    own, wide = rows[order], losses[order].astype(np.float64)
    starts = np.flatnonzero(np.concatenate([[True], own[1:] != own[:-1]]))
    counts = np.diff(np.append(starts, len(own)))
    mean = np.add.reduceat(wide, starts) / counts
    apart = np.add.reduceat((wide - np.repeat(mean, counts)) ** 2, starts) / counts
    rose = np.concatenate([[False], np.diff(z[order]) > 1.0])
    rose[starts] = False
    return Course(mean, np.sqrt(apart), np.add.reduceat(rose.astype(np.float64), starts))
