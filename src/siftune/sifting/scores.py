"""Scores of rows by their likeness to a target, and the share of a pool to train on.

    B_i   loss of row i under the base model, in nats per label token
    K_i   loss of row i under the model after a short training on rows of the target alone
    s_i = K_i − B_i

Training on the target lowers the loss of rows like it, so rows with a low score are kept. To first order, s_i sums
−lr·⟨gradient of row i, gradient of the target's rows⟩ over the steps of that training, without forming either.

Moore and Lewis ("Intelligent Selection of Language Model Training Data", ACL 2010) select text by the difference of
two losses. Ours: the two models are one model with and without a short training, only label tokens count, and rows of
the target determine the share.

Shapes: R rows of the pool, T rows of the target.
"""

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


REACH = 0.75  # share of the target's held-out rows that the threshold keeps
FEWEST, MOST = 0.125, 0.5  # share of the pool


def held_out_count(rows: int) -> int:
    """Number of the target's rows that are held out of the training: a fifth, at least 8, at most half (ours).

    Example:
        >>> [held_out_count(rows) for rows in (8, 16, 100)]
        [4, 8, 20]
    """
    return min(max(rows // 5, 8), rows // 2)


def count_like_target(scores_R: Floats, target_T: Floats) -> int:
    """Number of rows to select from a pool, by the scores of rows of the target that were held out of the training.

    The threshold is the score below which three quarters of the target's rows are. If more than half of the pool is
    below it, little can be sifted out, and all of the pool is selected. At least an eighth of the pool is selected, so
    that few rows are not repeated too often. (Ours; docs/sifting.md has the measurements.)

    Args:
        scores_R: Scores of the pool.
        target_T: Scores of the target's held-out rows.

    Example:
        >>> pool, target = np.linspace(-1, 3, 401), np.array([-1.0, -0.5, -0.5, 0.0, 1.0])
        >>> count_like_target(pool, target)
        101
        >>> count_like_target(pool, target + 2)
        401
    """
    below = int((scores_R <= np.quantile(target_T, REACH)).sum())
    return len(scores_R) if below > MOST * len(scores_R) else max(below, round(FEWEST * len(scores_R)))
