"""Suspect rows, by comparison of a row's answer with those of rows that have similar prompts.

The score of a row is its margin (`margins`) under a model that was not trained on the row: by how many nats its prompt
favours the answer of another row over its own. A row is suspect if its prompt favours the other answer ten times as
much (ours). If rows do not share answers, the usual loss of an answer is known from few prompts, so the other answer
must also be ten times as likely (ours). docs/rows.md has the share of suspects that were wrong.

Correct rows of a task that the model has not learned lose by chance. None is suspect if the model prefers the other
answer in more than half of the rows, or if fewer than 3 % of the rows would be suspect (ours). Nor is any if rows do
not share answers and the typical one has a probability below one in a thousand, as in translations: with many
possible answers, probabilities of two correct ones differ by more than ten times (ours).

Wrong matches are found by competition with decoys in mass spectrometry (Elias and Gygi, Nature Methods 2007), and wrong
labels by out-of-sample probabilities in confident learning (Northcutt, Jiang and Chuang, JAIR 2021). The comparison
with answers of similar prompts is ours.

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
_RARE = 1000  # one over the least probability of the typical answer (ours; measured: 7, or above 10**10)
COMPARED = 30  # rows with a decoy, at least (ours)


@dataclass(frozen=True, eq=False)
class Verdict:
    """Rows in order of suspicion.

    Attributes:
        order: (R,) int64 numbers of the rows: the suspects, then the other rows, each with the highest scores first;
            last those without a decoy.
        count: Number of suspects, the first in this order.
        score: (R,) float64, the margins; NaN without a decoy.
        doubt: The reason as a clause if no row is suspect; otherwise empty.
    """

    order: NDArray[np.int64]
    count: int
    score: NDArray[np.float64]
    doubt: str


def judge(loss_R: Floats, other_R: Floats, usual_R: Floats, other_usual_R: Floats, shared: bool) -> Verdict:
    """Order rows, and count the suspects.

    Args:
        loss_R: Losses of the rows' answers, a(x_i, y_i) in `margins`, in nats.
        other_R: Of the other answer, a(x_i, y_k); NaN without one.
        usual_R: Usual loss of the row's answer, u(y_i).
        other_usual_R: Of the other answer, u(y_k).
        shared: Whether rows share a few answers: see `decoys`.

    Example:
        >>> loss, other = np.repeat([0.1, 8.0], [80, 20]), np.repeat([7.0, 2.0], [80, 20])
        >>> judge(loss, other, usual_R=np.full(100, 8.0), other_usual_R=np.full(100, 8.0), shared=False).count
        20
    """
    gain_R, other_gain_R = usual_R - loss_R, other_usual_R - other_R
    score_R = np.asarray(other_gain_R - gain_R, np.float64)
    compared_R = ~np.isnan(score_R)
    suspect_R = (score_R if shared else np.minimum(score_R, loss_R - other_R)) >= np.log(TIMES)
    compared, lost, suspect = (int(part.sum()) for part in (compared_R, score_R > 0, suspect_R))
    doubt = ""
    if compared < COMPARED:
        doubt = f"only {counted(compared, 'row')} can be compared with a row of another answer, {COMPARED} are needed"
    elif lost > _MOST * compared:
        preferred = f"{lost / compared:.0%} of the rows"
        doubt = f"the model prefers an answer of another row in {preferred}, so it has learned too little"
    elif not shared and np.median(loss_R[compared_R]) > np.log(_RARE):
        doubt = (
            f"the typical answer has a probability below 1 in {_RARE:,} under the model: with many possible "
            f"answers, one that fits {TIMES} times as well says little"
        )
    elif suspect < _LEAST * compared:
        doubt = f"in only {suspect / compared:.1%} of rows another answer fits {TIMES} times as well as their own"
    if doubt:
        suspect_R[:] = False
    order_R = np.lexsort((-score_R, ~compared_R, ~suspect_R))  # the last key is the first
    return Verdict(order_R, int(suspect_R.sum()), score_R, doubt)
