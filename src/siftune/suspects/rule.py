"""Suspect rows, by comparison of a row's answer with those of rows that have similar prompts.

A decoy of row i is its prompt x_i with the answer of such a row (`decoys`). Let y_i be the answer of row i, y_k that of
its most likely decoy, and p the probabilities of a model that was not trained on row i. The score of the row is

    s_i = ln p(y_k | x_i) − ln p(y_i | x_i)

with products over the tokens of an answer: exp(s_i) says how many times as likely the other answer is. Let p be the
probabilities of right answers, a share q of the rows be wrong, and w the share of the answer y_i among the wrong ones
that rows get in the place of y_k. If one of both answers is right, then by Bayes

    P(row i is wrong) / P(row i is right) = exp(s_i) q w / (1 − q)

Neither q nor w is known, and a model that has learned from wrong rows only comes near to p. So the limit is measured:
a row is suspect if the other answer is ten times as likely (ours). About four fifths of the suspects were wrong in
each pool of docs/rows.md.

Some answers are likely after any prompt, such as short ones. The row's own prompt must therefore favour the other
answer more than its own, compared with prompts x_k and x_j of other rows (ours):

    ln p(y_k | x_i) − ln p(y_k | x_j) ≥ ln p(y_i | x_i) − ln p(y_i | x_k)

Correct rows of a task that the model has not learned lose by chance. None is suspect if the model prefers the other
answer in more than half of the rows, or if fewer than 3 % of the rows would be suspect (ours).

Wrong matches are found by competition with decoys in mass spectrometry (Elias and Gygi, Nature Methods 2007), and wrong
labels by out-of-sample probabilities in confident learning (Northcutt, Jiang and Chuang, JAIR 2021). Decoys of similar
prompts and the comparison with other prompts are ours.

Shapes: R rows.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from siftune.base.text import counted

Floats = NDArray[np.floating]
TIMES = 10  # as likely (ours)
_LEAST = 0.03  # share of suspects; fewer cannot be told from correct rows that lose by chance (ours)
_MOST = 0.5  # share of rows that lose (ours)
COMPARED = 30  # rows with a decoy, at least (ours)


@dataclass(frozen=True, eq=False)
class Verdict:
    """Rows in order of suspicion.

    Attributes:
        order: (R,) int64 numbers of the rows: the suspects, then the other rows, each with the highest scores first;
            last those without a decoy.
        count: Number of suspects, the first in this order.
        score: (R,) float64, by how much the other answer is more likely, in nats; NaN without a decoy.
        doubt: The reason as a clause if no row is suspect; otherwise empty.
    """

    order: NDArray[np.int64]
    count: int
    score: NDArray[np.float64]
    doubt: str


def judge(loss_R: Floats, other_R: Floats, elsewhere_R: Floats, other_elsewhere_R: Floats) -> Verdict:
    """Order rows, and count the suspects.

    Args:
        loss_R: −ln p(y_i | x_i), summed over tokens, in nats.
        other_R: −ln p(y_k | x_i); NaN without a decoy.
        elsewhere_R: −ln p(y_i | x_k); it counts only where `other_R` is smaller than `loss_R`. NaN if not measured:
            the row is no suspect then.
        other_elsewhere_R: −ln p(y_k | x_j); the same.

    Example:
        >>> loss, other = np.repeat([0.1, 8.0], [80, 20]), np.repeat([7.0, 2.0], [80, 20])
        >>> judge(loss, other, elsewhere_R=np.full(100, 8.0), other_elsewhere_R=np.full(100, 7.0)).count
        20
    """
    score_R = loss_R.astype(np.float64) - other_R
    compared_R = ~np.isnan(score_R)
    favoured_R = other_elsewhere_R - other_R >= elsewhere_R - loss_R
    suspect_R = (score_R >= np.log(TIMES)) & favoured_R
    compared, lost, suspect = (int(part.sum()) for part in (compared_R, score_R > 0, suspect_R))
    doubt = ""
    if compared < COMPARED:
        doubt = f"only {counted(compared, 'row')} can be compared with a row of another answer, {COMPARED} are needed"
    elif lost > _MOST * compared:
        preferred = f"{lost / compared:.0%} of the rows"
        doubt = f"the model prefers an answer of another row in {preferred}, so it has learned too little"
    elif suspect < _LEAST * compared:
        doubt = f"only {suspect / compared:.1%} are {TIMES} times less likely than the answer of another row"
    if doubt:
        suspect_R[:] = False
    order_R = np.lexsort((-score_R, ~compared_R, ~suspect_R))  # the last key is the first
    return Verdict(order_R, int(suspect_R.sum()), score_R, doubt)
