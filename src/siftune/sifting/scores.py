"""Scores of a pool's rows by their likeness to a target, and the selection by them.

    B_i   loss of row i under the base model, in nats per label token
    K_i   loss of row i under the model after a short training on rows of the target alone
    s_i = K_i − B_i

The training on the target makes rows like it more likely (s_i < 0), and rows that contradict it less likely. To first
order, s_i sums −lr·⟨gradient of row i, gradient of the target's rows⟩ over the steps of the training, without forming
either gradient.

Moore and Lewis ("Intelligent Selection of Language Model Training Data", ACL 2010) select text by the difference of
two losses. Ours: the two models are one model with and without a short training, only label tokens count, and 0 is the
limit.

Shapes: R rows of the pool, T rows of the target.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def scores(tuned_R: Floats, base_R: Floats) -> Floats:
    """Score rows: their loss after the training minus their loss before it; (R,) float64, nats per label token.

    Args:
        tuned_R: Loss under the model after the training, in nats per label token.
        base_R: Loss under the base model.

    Example:
        >>> scores(np.array([0.5, 2.0]), np.array([2.0, 1.5])).tolist()
        [-1.5, 0.5]
    """
    return tuned_R - base_R


def lowest(scores_R: Floats, count: int) -> NDArray[np.int64]:
    """Positions of the `count` lowest scores in ascending order of position; the first of equal ones.

    Example:
        >>> lowest(np.array([0.5, -1.0, 0.5, -2.0]), 3).tolist()
        [0, 1, 3]
    """
    return np.sort(np.argsort(scores_R, kind="stable")[:count])


def held_out_count(rows: int) -> int:
    """Number of the target's rows that are held out of the training: a fifth, at least 8, at most half (ours).

    Example:
        >>> [held_out_count(rows) for rows in (8, 16, 100)]
        [4, 8, 20]
    """
    return min(max(rows // 5, 8), rows // 2)


class Choice(NamedTuple):
    """How many rows of a pool are selected, and why."""

    rows: int
    reason: str


def choose(scores_R: Floats, target_T: Floats) -> Choice:
    """Select the rows with a score below 0: those that the training on the target made more likely (ours).

    The target's held-out rows show whether to trust it. The complete pool is selected if the training made fewer than
    half of them more likely, or if it made as large a share of the pool more likely as of them.

    Args:
        scores_R: Scores of the pool.
        target_T: Scores of the target's held-out rows.

    Example:
        >>> choose(np.array([-2.0, -1.0, 1.0, 3.0]), np.array([-2.0, -1.0, 0.5])).rows
        2
        >>> choose(np.array([-2.0, -1.0, 1.0, 3.0]), np.array([-0.5, 0.5, 1.0])).rows
        4
    """
    below, of_target = int((scores_R < 0).sum()), float((target_T < 0).mean())
    rows = len(scores_R)
    if of_target < 0.5:
        return Choice(
            rows,
            f"the training on the target made only {of_target:.0%} of its held-out rows more likely, so the pool "
            "cannot be sifted by it",
        )
    if below >= of_target * rows:
        return Choice(
            rows, "as many rows of the pool as of the target became more likely, so there is nothing to sift out"
        )
    return Choice(below, "the training on the target made these rows more likely, and the others less likely")


_REACHED = 0.9  # share of the held-out bad rows whose scores are within the limit (ours)
_MOST = 0.6  # share of the pool (ours)


def unlike(scores_R: Floats, bad_B: Floats) -> Choice:
    """Leave out the rows with a score up to the limit that nine of ten held-out bad rows are within (ours).

    None is left out if more than 60 % of the pool is within it: then the bad rows do not stand out.

    Args:
        scores_R: Scores of the pool by the bad rows.
        bad_B: Scores of the held-out bad rows.

    Returns:
        The number of rows that remain: those with the highest scores.

    Example:
        >>> unlike(np.array([-2.0, -1.0, 1.0, 3.0]), np.array([-2.5, -1.5])).rows
        3
        >>> unlike(np.array([-2.0, -1.0, 1.0, 3.0]), np.array([-0.5, 2.0])).rows
        4
    """
    within = int((scores_R <= np.quantile(bad_B, _REACHED, method="higher")).sum())
    if within > _MOST * len(scores_R):
        return Choice(
            len(scores_R),
            f"{within / len(scores_R):.0%} of the pool is as much like the bad rows as those held out: none is dropped",
        )
    return Choice(len(scores_R) - within, f"as much like the bad rows as those held out, and left out: {within:,}")
