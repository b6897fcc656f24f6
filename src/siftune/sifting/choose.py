"""Selection of a pool's rows by a model that was tuned on a few correct rows.

If the rows of a task share a few answers, as labels do, the score of a row is its margin over the answers of rows with
similar prompts (suspects/margins.py): by how many nats another answer fits its prompt better than its own. The model is
tuned on the pool first, which teaches the form of the answers, and those of which the target has few. A loss by itself
says less then: rows that are hard for the model have high losses, whether they are correct or not, as have rows with an
answer that is rare in the target. Rows with a margin up to 1 are selected, and in any case two in five of the rows with
each of its answers.

Otherwise the right answer is not among those of similar prompts, and the loss is compared with those of correct rows:

    K_i   loss of row i under the model tuned on the target, summed over its label tokens
    n_i   number of its label tokens
    s_i = K_i / sqrt(n_i)

The mean over tokens hides one wrong word in a long answer, and the sum disfavours long answers: the root is between the
two (ours). Rows of the target that the training leaves out are correct. Decoys are wrong rows made on purpose: prompts
of these rows with other completions. Rows of the pool are left out if their scores are above those of four in five of
the correct rows and of one in ten decoys. A limit by the correct rows alone would be narrow: they are few, and the
training stops where their loss is the lowest.

In both cases, none is left out if the model cannot tell correct rows of the target from others, or if hardly any row of
the pool looks wrong: then the pool has no errors, or only such that this comparison does not see.

Prior art: selection by a loss after training on trusted rows is that of RHO-LOSS (Mindermann et al., arXiv 2206.07137)
and CoLoR-Filter (Brandfonbrener et al., arXiv 2406.10670), which subtract the loss under another model, as do Moore and
Lewis (ACL 2010), Rho-1 (arXiv 2404.07965) and Token Cleaning (arXiv 2502.01968); TACS (arXiv 2605.09404) divides the
drop by the first loss. Confident learning (Northcutt, Jiang and Chuang, JAIR 2021) compares the probability of a label
with those of the other labels. Ours: the margin over answers of similar prompts, the training on the pool first, the
limits, and their check by decoys. Prompts are compared first: similarity.py.

Shapes: R rows of the pool, T held-out rows of the target, D decoys.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from siftune.base.text import counted
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


_WITHIN = 0.8  # share of the held-out rows that the limit retains, at least (ours)
_AMONG_DECOYS = 0.1  # share of decoys that it retains, at least (ours)
_SEPARATION = 0.6  # of decoys from held-out rows, at least (ours)
_WRONG = 0.05  # share of the task's rows that are as unlikely as decoys beyond that of held-out rows, at least (ours)
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


def choose_by_losses(
    scores_R: Floats, target_T: Floats, decoys_D: Floats, task_R: NDArray[np.bool_], limit: float | None = None
) -> Choice:
    """Select the rows of the target's task without those that contradict the target (ours).

    Rows are left out above the scores that four in five held-out rows and one in ten decoys do not exceed. All rows of
    the task are selected if there are fewer than 8 decoys, if less than 60 % of the pairs of a decoy and a held-out row
    are in order, or if the share of rows that are as unlikely as decoys is less than 5 points above that of the
    held-out rows, which are correct. A limit that is given decides alone.

    Args:
        scores_R: Scores of the pool; only those of rows of the task count, of which there must be one.
        target_T: Scores of the target's held-out rows.
        decoys_D: Scores of decoys of these.
        task_R: Rows of the pool that are of the task, by the similarity of their prompts.
        limit: The highest score of a selected row; None: that of the held-out rows and decoys.

    Example:
        >>> pool, task = np.array([0.2, 5.0, 4.5, 0.1]), np.array([True, True, True, False])
        >>> choose_by_losses(pool, np.array([0.1, 0.3]), np.repeat([2.0, 4.0], 4), task).rows_R.tolist()
        [True, False, False, False]
        >>> choose_by_losses(pool, np.array([0.1, 0.3]), np.repeat([2.0, 4.0], 4), task, limit=4.5).rows_R.tolist()
        [True, False, True, False]
        >>> choose_by_losses(pool, np.array([0.1, 4.0]), np.repeat([0.2, 3.0], 4), task).rows_R.tolist()
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
            f"{prompts}; the model cannot tell right completions from wrong ones, and none is left out: it prefers a "
            f"held-out row of the target to a prompt with another row's completion in only {in_order:.1%} of all pairs",
        )
    wrong, correct = (share_like_decoys(rows, decoys_D, _DECOYS) for rows in (scores_R[task_R], target_T))
    if wrong - correct < _WRONG:
        return Choice(
            task_R,
            f"{prompts}; hardly any completion looks wrong, and none is left out: {wrong:.1%} of the rows and "
            f"{correct:.1%} of the held-out ones are as unlikely as prompts of the target with the completion of "
            "another row",
        )
    usual = float(np.quantile(target_T, _WITHIN, method="higher"))
    limit = max(usual, float(np.quantile(decoys_D, _AMONG_DECOYS, method="lower")))
    within_R = task_R & (scores_R <= limit)
    left_out = 1 - within_R.sum() / task_R.sum()
    return Choice(
        within_R,
        f"{prompts}; {left_out:.0%} of the task's rows are left out, since their completions are less likely than "
        f"{_WITHIN:.0%} of those held out and as unlikely as completions of other rows",
        limit,
    )


_LIMIT = 1.0  # nats by which another answer may fit better (ours)
_COMPARED = 8  # held-out rows, at least (ours)
_RIGHT = 0.6  # share of the held-out rows within the limit, at least (ours)
_BEYOND = 0.03  # share of the task's rows beyond the limit, at least (ours)
_OF_ANSWER = 0.4  # share of the rows with an answer of the target, at least (ours)
_HARD = 3.0  # nats: if most margins beyond the limit are smaller, many of these rows may be correct but hard (ours)


def choose_by_margins(
    scores_R: Floats,
    target_T: Floats,
    task_R: NDArray[np.bool_],
    answers_R: NDArray[np.int64],
    limit: float | None = None,
) -> Choice:
    """Select the rows of the target's task without those to whose prompts another answer fits better (ours).

    Rows with a margin above 1 are left out, but of the rows with the same answer of the target, two in five remain:
    those with the lowest margins. An answer that the model has hardly learned, since the target has few rows with it,
    would disappear otherwise. All rows of the task are selected if fewer than 8 held-out rows can be compared, if less
    than 60 % of these are within the limit, or if less than 3 % of the task's rows are beyond it. A limit that is given
    decides alone. Rows without a margin are selected. If most of the margins beyond the limit are below 3 nats, the
    reason says that many of these rows may be correct.

    Args:
        scores_R: Margins of the pool's rows; only those of rows of the task count, of which there must be one.
        target_T: Margins of the target's held-out rows.
        task_R: Rows of the pool that are of the task, by the similarity of their prompts.
        answers_R: Numbers of the target's answers that the rows have; -1 for other answers.
        limit: The highest score of a selected row; None: 1, except for these two in five.

    Example:
        >>> pool, task = np.array([-2.0, 5.0, 1.5, -9.0]), np.array([True, True, True, False])
        >>> choose_by_margins(pool, np.repeat(-3.0, 8), task, answers_R=np.array([0, 0, -1, 0])).rows_R.tolist()
        [True, False, False, False]
        >>> choose_by_margins(pool, np.repeat(-3.0, 8), task, answers_R=np.array([0, 1, 1, 0])).rows_R.tolist()
        [True, False, True, False]
        >>> choose_by_margins(pool, np.repeat(-3.0, 8), task, np.array([0, 0, -1, 0]), limit=2.0).rows_R.tolist()
        [True, False, True, False]
        >>> choose_by_margins(pool, np.repeat(3.0, 8), task, np.array([0, 0, -1, 0])).rows_R.tolist()
        [True, True, True, False]
    """
    prompts = "their prompts are like the target's"
    within_R = task_R & ~(scores_R > (_LIMIT if limit is None else limit))
    if limit is not None:
        return Choice(within_R, f"{prompts}, and their scores are within the limit", limit)
    compared_T = target_T[~np.isnan(target_T)]
    if len(compared_T) < _COMPARED:
        reason = "answers are not compared, since too few rows with similar prompts have different ones"
        return Choice(task_R, f"{prompts}; {reason}")
    right = float((compared_T <= _LIMIT).mean())
    if right < _RIGHT:
        return Choice(
            task_R,
            f"{prompts}; the model cannot tell right answers from wrong ones, and none is left out: for "
            f"{1 - right:.0%} of the held-out rows of the target it prefers another row's answer",
        )
    wrong = 1 - within_R.sum() / task_R.sum()
    if wrong < _BEYOND:
        return Choice(
            task_R,
            f"{prompts}; hardly any answer looks wrong, and none is left out: the answer of another row fits better in "
            f"only {wrong:.1%} of the rows",
        )
    remaining_R = within_R | _likeliest_of_answers(scores_R, task_R, answers_R)
    gone = 1 - remaining_R.sum() / task_R.sum()
    reason = f"{prompts}; {gone:.0%} of the task's rows are left out, since another answer fits their prompts better"
    if further := int((remaining_R & ~within_R).sum()):
        reason += f", but {further:,} such rows remain, the likeliest with their answers"
    if np.median(scores_R[task_R & ~within_R]) < _HARD:
        reason += "; most margins are small, and many of these rows may be correct but hard: compare with a training "
        reason += "on all rows"
    return Choice(remaining_R, reason, _LIMIT)


def _likeliest_of_answers(
    scores_R: Floats, task_R: NDArray[np.bool_], answers_R: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Two in five of the task's rows with each answer of the target: those without a score, then the lowest."""
    likeliest_R, order_R = np.zeros(len(scores_R), bool), np.where(np.isnan(scores_R), -np.inf, scores_R)
    for answer in np.unique(answers_R[task_R & (answers_R >= 0)]):
        own = (task_R & (answers_R == answer)).nonzero()[0]
        first = own[np.argsort(order_R[own], kind="stable")]
        likeliest_R[first[: math.ceil(_OF_ANSWER * len(own))]] = True
    return likeliest_R


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
        return Choice(
            ~within_R,
            f"left out, as like the bad rows as nine in ten of those held out: {counted(int(within_R.sum()), 'row')}",
        )
    likely_R = scores_R < 0
    if likely_R.mean() <= _MOST:
        reason = f"left out, made more likely by the training on the bad rows: {counted(int(likely_R.sum()), 'row')}"
        return Choice(~likely_R, reason)
    return Choice(
        every, f"the training on the bad rows made {likely_R.mean():.0%} of the pool more likely: none is dropped"
    )
