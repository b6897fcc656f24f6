"""Allotment of the kept parameters to the matrices of a model, where they save most *(ours)*.

Every matrix m can be compressed to some sizes n_m,1 < n_m,2 < …, at a measured cost c_m,s each: what is lost of it in
the metric of the curvature, ⟨δ, H δ⟩ as in `kfac`, which has one unit for all matrices. Wanted is the least cost,

    min Σ_m c_m,s(m)      with  Σ_m n_m,s(m) ≤ budget

Each matrix starts at its smallest size. Then, again and again, the step is taken that saves most per parameter. Steps
go along the lower convex hull of a matrix's points, so that a good step behind a poor one is not missed. This is
filling water into vessels up to one level, the marginal cost. On the hulls it is the optimum, but for the last step of
each matrix, which may not fit: it goes as far as it does. A cost that rises with the size counts as the lowest before.

Prior art shares out ranks by other measures: ASVD (Yuan et al., 2023, arXiv 2312.05821) by the loss of the model with
one matrix truncated at a time, SVD-LLM V2 (Wang et al., 2025, arXiv 2503.12340) by truncation losses; ZipLM (Kurtic et
al., 2023, arXiv 2302.04089) picks from a table of errors under a budget. Here one table has directions and channels,
and its costs are of rows that did not choose what stays (`emulator/plan.py`).

Symbols: n `sizes`, c `costs`.
"""

import heapq
import math
from collections.abc import Sequence
from itertools import accumulate

from siftune.base.errors import RecipeError


def water_fill(sizes: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Choose a size for every matrix.

    Args:
        sizes: For every matrix the sizes that it can have, ascending; in parameters.
        costs: The cost at each of them.
        budget: What all sizes may sum to, in parameters.

    Returns:
        For every matrix the place of its size.

    Raises:
        RecipeError: The smallest sizes sum to more than the budget.

    Example:
        >>> water_fill([[1, 2, 3], [1, 2, 3]], [[9, 4, 3], [5, 4, 0]], 5)
        [1, 2]
    """
    places = [0] * len(sizes)
    left = budget - sum(one[0] for one in sizes)
    if left < 0:
        raise RecipeError(
            f"{budget:.0f} parameters of the middle's matrices are to be kept, but no fewer than {budget - left:.0f} "
            "can be shared out; give a larger keep"
        )
    hulls = [hull(*one) for one in zip(sizes, costs, strict=True)]
    steps = [_step(hulls[m], 0, m) for m in range(len(sizes)) if len(hulls[m]) > 1]
    heapq.heapify(steps)
    while steps:
        _, _, m, at = heapq.heappop(steps)
        own, target = sizes[m], hulls[m][at + 1][0]
        room = own[places[m]] + left
        if own[target] > room:
            target = max(s for s in range(places[m], target) if own[s] <= room)
        elif at + 2 < len(hulls[m]):
            heapq.heappush(steps, _step(hulls[m], at + 1, m))
        left = room - own[target]
        places[m] = target
    return places


def hull(sizes: Sequence[float], costs: Sequence[float]) -> list[tuple[int, float, float]]:
    """The points of a matrix that no mixture of two others beats, as (place, size, cost), from the smallest size on.

    Args:
        sizes: Ascending.
        costs: The cost at each; counted as the lowest of those up to it.
    """
    points = list(zip(range(len(sizes)), sizes, accumulate(costs, min), strict=True))
    hull = points[:1]
    for point in points[1:]:
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) < _saving(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _saving(one: tuple[int, float, float], other: tuple[int, float, float]) -> float:
    """The saving per parameter between two points."""
    growth = other[1] - one[1]
    return (one[2] - other[2]) / growth if growth else math.inf


def _step(points: Sequence[tuple[int, float, float]], at: int, m: int) -> tuple[float, float, int, int]:
    """A step along a hull, as the heap orders it: the best first; of equal ones that of the smallest share."""
    return -_saving(points[at], points[at + 1]), points[at][1] / points[-1][1], m, at
