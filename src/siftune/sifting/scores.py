"""Selection of a pool's rows by their losses after a short training on the pool, and then on a few correct rows.

    K_i   loss of row i under the model after both trainings, summed over its label tokens
    n_i   number of its label tokens
    s_i = K_i / sqrt(n_i)

The training on the pool teaches the form of the answers, and those kinds of rows of which the target has few. The
training on rows of the target alone then teaches which answers are correct, so a wrong answer to the same kind of
prompt has a higher loss. Without the first, correct rows that differ from the few are as unlikely as wrong ones. The
mean over tokens hides one wrong word in a long answer, and the sum disfavours long answers: the root is between the two
(ours). Rows of the target that the training leaves out are correct. Their scores give the limit: rows of the pool with
a score above that of four in five of them are left out.

Decoys are wrong rows made on purpose: prompts of these rows with completions of other rows of the target. None is left
out if the model cannot tell decoys from correct rows, or if hardly any row of the pool is as unlikely as a decoy: then
the pool has no such errors, or only errors that this comparison does not see.

Prior art: selection by a loss after training on trusted rows is that of RHO-LOSS (Mindermann et al., arXiv 2206.07137)
and CoLoR-Filter (Brandfonbrener et al., arXiv 2406.10670), which subtract the loss under another model, as do Moore and
Lewis (ACL 2010), Rho-1 (arXiv 2404.07965) and Token Cleaning (arXiv 2502.01968); TACS (arXiv 2605.09404) divides the
drop by the first loss. On pools whose errors nobody planted, subtracting the base's loss makes the score worse
(docs/sifting.md). Ours: the training on the pool first, K alone, a limit by held-out rows, and its check by decoys.
Prompts are compared first: similarity.py.

Shapes: R rows of the pool, T held-out rows of the target, D decoys.
"""

from collections import Counter
from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from siftune.sifting.share import share_like_decoys

Floats = NDArray[np.float64]


def scores(losses_R: Floats, tokens_R: Floats) -> Floats:
    """Score rows; (R,) float64. The lower, the more a row is like the target.

    Args:
        losses_R: Losses after the training on the target, summed over label tokens, in nats.
        tokens_R: Numbers of label tokens, at least 1.

    Example:
        >>> scores(np.array([3.0, 3.0]), np.array([1.0, 9.0])).tolist()
        [3.0, 1.0]
    """
    return losses_R / np.sqrt(tokens_R)


def lowest(scores_R: Floats, count: int, first_R: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The `count` rows with the lowest scores, of `first_R` before others; the first of equal ones.

    Example:
        >>> lowest(np.array([0.5, -1.0, 0.5, -2.0]), 2, np.array([True, True, True, False])).tolist()
        [True, True, False, False]
    """
    rows_R = np.zeros(len(scores_R), bool)
    rows_R[np.lexsort((scores_R, ~first_R))[:count]] = True
    return rows_R


class Limits(NamedTuple):
    """Limits by the target: those that a user gives, or those by which rows were selected. None: no such limit.

    Attributes:
        score: The highest score of a selected row.
        similarity: The lowest similarity of its prompt to those of the target.
    """

    score: float | None = None
    similarity: float | None = None


NO_LIMITS = Limits()


class Choice(NamedTuple):
    """The rows of a pool that are selected, (R,), the reason, and the highest score of a selected row, if limited."""

    rows_R: NDArray[np.bool_]
    reason: str
    limit: float | None = None


_WITHIN = 0.8  # share of the held-out rows that the limit retains (ours)
_SEPARATION = 0.6  # of decoys from held-out rows, at least (ours)
_WRONG = 0.05  # share of the task's rows that are as unlikely as decoys, at least (ours)
_DECOYS = 8  # at least (ours)


def separation(decoys_D: Floats, target_T: Floats) -> float:
    """Share of pairs of a decoy and a held-out row in which the decoy has the higher score; ties count half.

    This is the area under the ROC curve. 0.5 without decoys: nothing is compared.

    Example:
        >>> separation(np.array([3.0, 1.0]), np.array([1.0, 2.0]))
        0.625
    """
    if not len(decoys_D):
        return 0.5
    below = [np.searchsorted(np.sort(target_T), decoys_D, side) for side in ("left", "right")]
    return float(np.mean(below) / len(target_T))


def choose(
    scores_R: Floats, target_T: Floats, decoys_D: Floats, task_R: NDArray[np.bool_], limit: float | None = None
) -> Choice:
    """Select the rows of the target's task without those that contradict the target (ours).

    Rows above the score that four in five held-out rows do not exceed are left out. All rows of the task are selected
    if there are fewer than 8 decoys, if less than 60 % of the pairs of a decoy and a held-out row are in order, or if
    less than 5 % of the rows are as unlikely as decoys. A limit that is given decides alone.

    Args:
        scores_R: Scores of the pool; only those of rows of the task count, of which there must be one.
        target_T: Scores of the target's held-out rows.
        decoys_D: Scores of decoys of these.
        task_R: Rows of the pool that are of the task, by the similarity of their prompts.
        limit: The highest score of a selected row; None: that of the held-out rows.

    Example:
        >>> pool, task = np.array([0.2, 5.0, 4.5, 0.1]), np.array([True, True, True, False])
        >>> choose(pool, np.array([0.1, 0.3]), np.repeat([2.0, 4.0], 4), task).rows_R.tolist()
        [True, False, False, False]
        >>> choose(pool, np.array([0.1, 0.3]), np.repeat([2.0, 4.0], 4), task, limit=4.5).rows_R.tolist()
        [True, False, True, False]
        >>> choose(pool, np.array([0.1, 4.0]), np.repeat([0.2, 3.0], 4), task).rows_R.tolist()
        [True, True, True, False]
    """
    prompts = "their prompts are like the target's"
    if limit is not None:
        return Choice(task_R & (scores_R <= limit), f"{prompts}, and their scores are within the limit", limit)
    if len(decoys_D) < _DECOYS:
        reason = "completions are not compared, since the target has too few prompts with different completions"
        return Choice(task_R, f"{prompts}; {reason}")
    in_order = separation(decoys_D, target_T)
    if in_order < _SEPARATION:
        return Choice(
            task_R,
            f"{prompts}; the model cannot tell wrong completions: it prefers a held-out row of the target to a prompt "
            f"with the completion of another row in only {in_order:.1%} of all pairs",
        )
    wrong = share_like_decoys(scores_R[task_R], decoys_D, _DECOYS)
    if wrong < _WRONG:
        return Choice(
            task_R,
            f"{prompts}; the model cannot tell wrong completions, or there are none: {wrong:.1%} of the rows are as "
            "unlikely as prompts of the target with the completion of another row",
        )
    limit = float(np.quantile(target_T, _WITHIN, method="higher"))
    within_R = task_R & (scores_R <= limit)
    left_out = 1 - within_R.sum() / task_R.sum()
    return Choice(
        within_R,
        f"{prompts}, and their completions are as likely as those of {_WITHIN:.0%} of its held-out rows; those of "
        f"{left_out:.0%} of the task's rows are less likely",
        limit,
    )


_SHARED = 10  # rows of the task with one answer, at least (ours)
_PARTS = 2  # an answer's selected share is at least half of the task's (ours)


def with_rare_answers(
    choice: Choice, scores_R: Floats, task_R: NDArray[np.bool_], answers_R: Sequence[str], known: Container[str]
) -> Choice:
    """Select rows with every frequent answer that the target has, too (ours).

    If the target has few rows with an answer, even correct rows with it have high scores, and all would be left out.
    Of an answer that 10 rows of the task have, the lowest scores are selected until its selected share is half of the
    task's.

    Args:
        choice: By a limit on the score.
        scores_R: Scores of the pool.
        task_R: Rows of the pool that are of the task.
        answers_R: Their completions.
        known: The completions of the target.

    Example:
        >>> few = Choice(np.repeat([True, False], [30, 10]), "", 1.0)
        >>> more = with_rare_answers(few, np.arange(40.0), np.ones(40, bool), ["a"] * 30 + ["b"] * 10, {"a", "b"})
        >>> np.flatnonzero(more.rows_R[30:]).tolist()
        [0, 1, 2, 3]
    """
    rows_R, answers, selected = choice.rows_R.copy(), np.array(answers_R), int(choice.rows_R.sum())
    for answer, count in Counter(answers[task_R].tolist()).items():
        own_R = task_R & (answers == answer)
        least = -(-selected * count // (_PARTS * int(task_R.sum())))
        if count >= _SHARED and answer in known and rows_R[own_R].sum() < least:
            rows_R |= lowest(scores_R, least, own_R)
    more = int(rows_R.sum()) - selected
    reason = f"{choice.reason}; {more:,} more have an answer of which the target has few rows"
    return choice._replace(rows_R=rows_R, reason=reason) if more else choice


_TOO_FEW = 0.5  # of the held-out rows (ours)


def too_few(bad_B: Floats) -> bool:
    """Whether the training on bad rows made half of the held-out ones less likely (ours): it learned them by heart.

    Example:
        >>> too_few(np.array([-1.0, -2.0, 0.5])), too_few(np.array([-1.0, 0.5]))
        (False, True)
    """
    return bool((bad_B >= 0).mean() >= _TOO_FEW)


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
