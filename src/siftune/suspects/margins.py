"""Margins: by how much an answer of another row fits a prompt better than the row's own answer.

    a(x, y)   −ln p(y | x), the loss of answer y after prompt x, summed over its n(y) label tokens, in nats
    u(y)      its usual loss: the mean of a(x, y) over the prompts x of other rows with which it was compared
    g(x, y)   u(y) − a(x, y), by how much the prompt makes the answer more likely
    s_i       max_k g(x_i, y_k) − g(x_i, y_i), the margin of row i over the answers y_k of its decoys

Some answers are likely after any prompt, such as short ones, those of many rows, or those that a model has learned from
wrong rows; the usual loss cancels this. Over all prompts, g would be an estimate of the pointwise mutual information of
prompt and answer (Church and Hanks, 1990), with which language models also answer multiple choice (Holtzman et al.,
EMNLP 2021). An answer that few prompts were compared with has an uncertain usual loss. It is therefore drawn towards
that of any answer, c per token: with m prompts, u(y) = (Σ a(x, y) + 10 c n(y)) / (m + 10). The margin as a score of
training rows, its decoys and this mean are ours.

Shapes: R rows, D decoys of a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
_PRIOR = 10.0  # prompts that the mean of all answers counts for (ours)


class Margins(NamedTuple):
    """Margins of rows, in nats; all NaN, and `other` -1, for a row without decoys.

    Attributes:
        score: (R,) float64, s_i: positive if another answer fits the prompt better.
        other: (R,) int64, number of the decoy with the largest gain.
        other_loss: (R,) float64, a(x_i, y_k) of its answer.
        usual: (R,) float64, u(y_i).
        other_usual: (R,) float64, u(y_k).
    """

    score: NDArray[np.float64]
    other: NDArray[np.int64]
    other_loss: NDArray[np.float64]
    usual: NDArray[np.float64]
    other_usual: NDArray[np.float64]


def margins(
    answers_R: Sequence[str], tokens_R: Floats, loss_R: Floats, decoys_RD: NDArray[np.int64], decoy_loss_RD: Floats
) -> Margins:
    """Compare each row's answer with those of its decoys.

    Args:
        answers_R: The rows' answers; equal ones share their usual loss.
        tokens_R: Numbers of their label tokens.
        loss_R: a(x_i, y_i); NaN for rows that serve as decoys only.
        decoys_RD: Numbers of the rows whose answers are compared, as of `decoys_of`; -1 where there is none.
        decoy_loss_RD: a(x_i, y_k); NaN where not measured.

    Example:
        >>> decoys, loss = np.array([[1], [0], [1]]), np.array([0.1, 0.2, 5.0])
        >>> compared = margins(["yes", "no", "yes"], np.ones(3), loss, decoys, decoy_loss_RD=np.full((3, 1), 2.0))
        >>> compared.score.round(1).tolist(), compared.other.tolist()
        ([-1.9, -1.8, 3.0], [1, 0, 1])
    """
    number_of = {text: number for number, text in enumerate(dict.fromkeys(answers_R))}
    answer_R = np.array([number_of[text] for text in answers_R], np.int64)
    asked_RD = (decoys_RD >= 0) & ~np.isnan(decoy_loss_RD)
    losses, given = decoy_loss_RD[asked_RD].astype(np.float64), decoys_RD[asked_RD]
    size = len(number_of)
    sums_A = np.bincount(answer_R[given], losses, minlength=size)
    prompts_A = np.bincount(answer_R[given], minlength=size)
    per_token = losses.sum() / max(float(tokens_R[given].sum()), 1.0)
    usual_R = (sums_A[answer_R] + _PRIOR * per_token * tokens_R) / (prompts_A[answer_R] + _PRIOR)

    gain_RD = np.where(asked_RD, usual_R[decoys_RD] - decoy_loss_RD, -np.inf)
    number_R, best_R = np.arange(len(answer_R)), gain_RD.argmax(1)
    compared_R = asked_RD.any(1) & ~np.isnan(loss_R)
    other_R = np.where(compared_R, decoys_RD[number_R, best_R], -1)

    def known(values_R: Floats) -> NDArray[np.float64]:
        return np.where(compared_R, values_R, np.nan)

    return Margins(
        score=known(gain_RD[number_R, best_R] - (usual_R - loss_R)),
        other=other_R,
        other_loss=known(decoy_loss_RD[number_R, best_R]),
        usual=known(usual_R),
        other_usual=known(usual_R[other_R]),
    )
