"""Scores of a pool's rows by their likeness to a target, and the selection by them and by the similarity of prompts.

    B_i   loss of row i under the base model, in nats per label token
    K_i   loss of row i under the model after a short training on rows of the target alone
    s_i = K_i − B_i

The training on the target makes rows like it more likely (s_i < 0), and rows that contradict it less likely. To first
order, and for SGD, s_i sums −lr·⟨gradient of row i, gradient of the target's rows⟩ over the steps of the training,
without forming either gradient; AdamW, the default, rescales the second one.

Moore and Lewis ("Intelligent Selection of Language Model Training Data", ACL 2010) select text by the difference of
two losses. Ours: the two models are one model with and without a short training, only label tokens count, 0 is the
limit, and prompts are compared first: similarity.py.

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


def lowest(scores_R: Floats, count: int, first_R: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The `count` rows with the lowest scores, of `first_R` before others; the first of equal ones.

    Example:
        >>> lowest(np.array([0.5, -1.0, 0.5, -2.0]), 2, np.array([True, True, True, False])).tolist()
        [True, True, False, False]
    """
    rows_R = np.zeros(len(scores_R), bool)
    rows_R[np.lexsort((scores_R, ~first_R))[:count]] = True
    return rows_R


_TOO_FEW = 0.5  # of the held-out rows (ours)


def too_few(target_T: Floats) -> bool:
    """Whether a training on the target made half of its held-out rows less likely (ours): it learned them by heart.

    Example:
        >>> too_few(np.array([-1.0, -2.0, 0.5])), too_few(np.array([-1.0, 0.5]))
        (False, True)
    """
    return bool((target_T >= 0).mean() >= _TOO_FEW)


def why_too_few(target_T: Floats) -> str:
    """What the training did to the held-out rows of a target that is `too_few`, and what to do.

    Example:
        >>> why_too_few(np.array([-1.0, 0.5]))
        'the training on the target made 50% of its held-out rows less likely: give more target rows'
    """
    unlikely = float((target_T >= 0).mean())
    return f"the training on the target made {unlikely:.0%} of its held-out rows less likely: give more target rows"


def training_lengths(steps: int) -> list[int]:
    """Steps of the training on the target, and of a shorter one if the rows are too few for it (ours).

    Example:
        >>> training_lengths(60)
        [60, 20]
    """
    return [steps, *([steps // 3] if steps >= 3 else [])]


def held_out_count(rows: int) -> int:
    """Number of the target's rows that are held out of the training: a fifth, at least 8, at most half (ours).

    Example:
        >>> [held_out_count(rows) for rows in (8, 16, 100)]
        [4, 8, 20]
    """
    return min(max(rows // 5, 8), rows // 2)


class Choice(NamedTuple):
    """The rows of a pool that are selected, (R,), and why."""

    rows_R: NDArray[np.bool_]
    reason: str


_EXCESS = 0.1  # of the share of rows that the training made less likely (ours)


def of_task(similar_R: Floats, similar_T: Floats) -> NDArray[np.bool_]:
    """Rows whose prompts are at least as similar to the target as those of all its held-out rows (ours); (R,).

    Args:
        similar_R: Similarity of the pool's prompts to those of the target's other rows, from -1 to 1.
        similar_T: Similarity of the held-out rows' prompts to them.

    Example:
        >>> of_task(np.array([0.9, 0.8, 0.2]), np.array([0.8, 0.9])).tolist()
        [True, True, False]
    """
    of_it_R: NDArray[np.bool_] = similar_R >= similar_T.min()
    return of_it_R


def choose(scores_R: Floats, target_T: Floats, task_R: NDArray[np.bool_]) -> Choice:
    """Select the rows of the target's task without those that contradict the target (ours).

    A row contradicts the target if the training on the target made it less likely: its score is not below 0. So are
    correct rows that the training was too short for. Rows are therefore only left out by their scores if the share of
    such rows is a tenth above that among the held-out rows, which are correct. If the target's rows are `too_few`, all
    rows of the pool are selected: prompts alone would leave out the other tasks, but no wrong rows.

    Args:
        scores_R: Scores of the pool.
        target_T: Scores of the target's held-out rows.
        task_R: Rows of the pool that are of the task, by `of_task`.

    Example:
        >>> pool, task = np.array([-2.0, 3.0, 1.0, -1.0]), np.array([True, True, True, False])
        >>> choose(pool, np.array([-2.0, -1.0, 0.5]), task).rows_R.tolist()
        [True, False, False, False]
        >>> choose(pool, np.array([-4.0, 2.0, 0.5]), task).rows_R.tolist()
        [True, True, True, True]
    """
    if too_few(target_T):
        return Choice(
            np.ones_like(task_R),
            f"the target leaves out none, because {why_too_few(target_T)}",
        )
    if not task_R.any():
        return Choice(task_R, "no prompt of the pool is like those of the target")
    unlikely, of_target = float((scores_R[task_R] >= 0).mean()), float((target_T >= 0).mean())
    if unlikely - of_target < _EXCESS:
        return Choice(
            task_R,
            f"their prompts are like the target's, and their completions too: {unlikely:.0%} became less likely, "
            f"and {of_target:.0%} of the target's held-out rows",
        )
    return Choice(
        task_R & (scores_R < 0),
        "their prompts are like the target's, and the training on the target made their completions more likely",
    )


_REACHED = 0.9  # share of the held-out bad rows whose scores are within the first limit (ours)
_MOST = 0.6  # share of the pool (ours)


def unlike(scores_R: Floats, bad_B: Floats) -> Choice:
    """Leave out the rows with a score up to the limit that nine of ten held-out bad rows are within (ours).

    If this is more than 60 % of the pool, one bad row may have set the limit: rows with a score below 0 are left out
    then, those that the training on the bad rows made more likely. None is left out if the bad rows do not stand out:
    if these are more than 60 % of the pool, too, or if the training made half of the held-out bad rows less likely.

    Args:
        scores_R: Scores of the pool by the bad rows.
        bad_B: Scores of the held-out bad rows.

    Returns:
        The rows that remain.

    Example:
        >>> unlike(np.array([-2.0, -1.0, 1.0, 3.0]), np.array([-2.5, -1.5])).rows_R.tolist()
        [False, True, True, True]
        >>> unlike(np.array([-2.0, -1.0, 1.0, 3.0]), np.array([-0.5, -0.1, 2.0])).rows_R.tolist()
        [False, False, True, True]
        >>> unlike(np.array([-2.0, -1.0, 1.0, 3.0]), np.array([-0.5, 2.0])).rows_R.all()
        np.True_
    """
    every = np.ones(len(scores_R), bool)
    if too_few(bad_B):
        unlikely = float((bad_B >= 0).mean())
        return Choice(
            every, f"the training on the bad rows made {unlikely:.0%} of the held-out ones less likely: none is dropped"
        )
    within_R = scores_R <= np.quantile(bad_B, _REACHED, method="higher")
    if within_R.mean() <= _MOST:
        return Choice(~within_R, f"as much like the bad rows as those held out, and left out: {within_R.sum():,}")
    likely_R = scores_R < 0
    if likely_R.mean() <= _MOST:
        reason = f"made more likely by the training on the bad rows, and left out: {likely_R.sum():,}"
        return Choice(~likely_R, reason)
    return Choice(
        every, f"the training on the bad rows made {likely_R.mean():.0%} of the pool more likely: none is dropped"
    )
