"""Number of suspect rows, by comparison with decoys.

A decoy is a row with the completion of another row of its source: a wrong row, made on purpose. Under one model, each
row and each decoy has a loss, summed over its label tokens. If a share q of a source's rows is wrong, and wrong rows
have losses like those of decoys, then for every loss t

    P(row ≥ t) = q P(decoy ≥ t) + (1 - q) P(correct row ≥ t) ≥ q P(decoy ≥ t)

so each ratio of the two shares bounds q from above. The least, over the middle losses of decoys, is close to q if few
correct rows reach these. Mixture proportions are bounded like that by Blanchard, Lee and Scott (JMLR 2010), and decoys
count wrong matches in mass spectrometry (Elias and Gygi, Nature Methods 2007). Decoys of rows and the use of gains are
ours.

The suspects of a source are the largest set of highest losses of which an estimated four fifths are wrong:
q R P(decoy ≥ t) ≥ 0.8 #(row ≥ t), with R rows, and t at least the smallest loss of a decoy. No spread and no form of
a distribution is estimated, and neither the length of completions nor the level of a task matters. If wrong rows are
harder to tell from correct ones than decoys are, q comes out too small, and fewer rows are suspect.

Rare answers that the model has not learned have high losses, too, wrong or correct. But the prompt of a correct row
lowers the loss of its answer, compared with another prompt of the source; that of a wrong row does not. So these gains
of rows and decoys bound q in the same way. If they allow less than half of what the losses say, the losses of the
source do not tell (ours). The half leaves room for chance: gains are measured for a sample of the rows. If the losses
allow more than three quarters, they do not tell either: no prompt helps a model that has not learned the task (ours).

The losses may come from any model, as long as one model scores all rows and decoys: the final one, or one that was
tuned on rows that are known to be correct.

Shapes: R rows, D decoys.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
WRONG = 0.8  # share of wrong rows among the suspects, estimated (ours)
_MIDDLE = (0.3, 0.7)  # shares of decoys between which t lies: few are beyond (ours)
_AGREE = 0.5  # of the share by losses that gains must allow (ours)
_LEAST = 0.02  # share of wrong rows; a smaller one cannot be told from rare correct rows (ours)
_MOST = 0.75  # a larger one says that prompts do not help the model: it has not learned the task (ours)
_DECOYS = 30  # of a source, at least (ours)


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of rows or decoys under one model; N of them.

    Attributes:
        loss: (N,) summed losses in nats.
        kind: (N,) number of each one's source.
        gain: (N,) losses of the same completions after another prompt of the source, minus `loss`; NaN where it was not
            measured, None if nowhere.
    """

    loss: NDArray[np.floating]
    kind: NDArray[np.integer]
    gain: NDArray[np.floating] | None = None

    def of(self, kind: int) -> "Scores":
        """Those of one source."""
        own = self.kind == kind
        return Scores(self.loss[own], self.kind[own], None if self.gain is None else self.gain[own])


@dataclass(frozen=True, eq=False)
class Verdict:
    """Rows in order of suspicion.

    Attributes:
        order: (R,) numbers of the rows, the most suspect first.
        count: Number of suspects, the first in this order; 0 if the losses do not tell.
        above: (R,) share of decoys of the row's source with a smaller loss; NaN without decoys.
    """

    order: NDArray[np.int64]
    count: int
    above: Floats


def judge(rows: Scores, decoys: Scores) -> Verdict:
    """Order rows, and count the suspects.

    Args:
        rows: Scores of the rows, from one model; gains of a sample are enough.
        decoys: Scores of decoys, from the same model.

    Example:
        >>> rows = Scores(np.repeat([0.1, 8.0], [80, 20]), np.zeros(100, dtype=int))
        >>> judge(rows, Scores(np.full(50, 8.0), np.zeros(50, dtype=int))).count
        20
    """
    above, apart = np.full(len(rows.loss), np.nan), rows.loss.astype(np.float64)
    suspect = np.zeros(len(rows.loss), dtype=bool)
    for kind in np.unique(decoys.kind):
        own, wrong = rows.kind == kind, np.sort(decoys.of(kind).loss)
        above[own] = np.searchsorted(wrong, rows.loss[own]) / len(wrong)
        apart[own] = rows.loss[own] - np.median(wrong)
        suspect[own] = rows.loss[own] >= _least_loss(rows.of(kind), decoys.of(kind))
    order = np.lexsort((-apart, np.isnan(above), ~suspect))  # the last key is the first
    return Verdict(order, int(suspect.sum()), above)


def _least_loss(rows: Scores, decoys: Scores) -> float:
    """Loss from which the rows of a source are suspect; infinite if none is."""
    share = share_like_decoys(rows.loss, decoys.loss, _DECOYS)
    if not _LEAST <= share <= _MOST:
        return np.inf
    if (
        rows.gain is not None
        and decoys.gain is not None
        and share_like_decoys(-rows.gain, -decoys.gain, _DECOYS) < _AGREE * share
    ):
        return np.inf
    losses, wrong = np.sort(rows.loss), np.sort(decoys.loss)
    expected = share * len(losses) * (1 - np.searchsorted(wrong, losses) / len(wrong))
    enough = (expected >= WRONG * (len(losses) - np.searchsorted(losses, losses))) & (losses >= wrong[0])
    return float(losses[enough.argmax()]) if enough.any() else np.inf


def share_like_decoys(rows: NDArray[np.floating], decoys: NDArray[np.floating], least: int) -> float:
    """Upper bound of the share of wrong rows, if these have scores like decoys; infinite if there are too few decoys.

    Args:
        rows: (R,) scores that are high for wrong rows; NaN where not measured.
        decoys: (D,) scores of decoys.
        least: Number of decoys that are needed.

    Example:
        >>> share_like_decoys(np.repeat([0.1, 8.0], [80, 20]), np.linspace(7.0, 8.0, 50), least=30)
        0.2
    """
    rows, decoys = (np.sort(scores[~np.isnan(scores)]) for scores in (rows, decoys))
    if len(decoys) < least or not len(rows):
        return np.inf
    middle = decoys[round(_MIDDLE[0] * len(decoys)) : round(_MIDDLE[1] * len(decoys))]
    reaching, wrong = (1 - np.searchsorted(scores, middle) / len(scores) for scores in (rows, decoys))
    return float((reaching / wrong).min())
