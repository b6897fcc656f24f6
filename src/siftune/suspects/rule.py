"""Number of suspect rows, by comparison with decoys.

A decoy is a row with the completion of another row of its source: a wrong row, made on purpose. Under one model, each
row and each decoy has a loss, summed over its label tokens. If a share q of a source's rows is wrong, and wrong rows
have losses like those of decoys, then for every loss t

    P(row ≥ t) = q P(decoy ≥ t) + (1 - q) P(correct row ≥ t) ≥ q P(decoy ≥ t)

so each ratio of the two shares bounds q from above. The least, over the middle losses of decoys, is close to q if few
correct rows reach these. Mixture proportions are bounded like that by Blanchard, Lee and Scott (JMLR 2010), and decoys
count wrong matches in mass spectrometry (Elias and Gygi, Nature Methods 2007). Decoys of rows are ours.

The suspects of a source are the largest set of highest losses of which an estimated four fifths are wrong:
q R P(decoy ≥ t) ≥ 0.8 #(row ≥ t), with R rows, and t at least the smallest loss of a decoy. No spread and no form of
a distribution is estimated, and neither the length of completions nor the level of a task matters. If wrong rows are
harder to tell from correct ones than decoys are, q comes out too small, and fewer rows are suspect.

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
_LEAST = 0.02  # share of wrong rows; a smaller one cannot be told from rare correct rows (ours)
_DECOYS = 30  # of a source, at least (ours)


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


def judge(
    losses: NDArray[np.floating],
    kinds: NDArray[np.integer],
    decoys: NDArray[np.floating],
    decoy_kinds: NDArray[np.integer],
) -> Verdict:
    """Order rows, and count the suspects.

    Args:
        losses: (R,) summed losses of rows in nats, from one model.
        kinds: (R,) number of each row's source.
        decoys: (D,) summed losses of decoys, from the same model.
        decoy_kinds: (D,) number of each decoy's source.

    Example:
        >>> rows, decoys = np.repeat([0.1, 8.0], [80, 20]), np.full(50, 8.0)
        >>> judge(rows, np.zeros(100, dtype=int), decoys, np.zeros(50, dtype=int)).count
        20
    """
    above, apart = np.full(len(losses), np.nan), losses.astype(np.float64)
    suspect = np.zeros(len(losses), dtype=bool)
    for kind in np.unique(decoy_kinds):
        own, wrong = kinds == kind, np.sort(decoys[decoy_kinds == kind])
        above[own] = np.searchsorted(wrong, losses[own]) / len(wrong)
        apart[own] = losses[own] - np.median(wrong)
        suspect[own] = losses[own] >= _least_loss(losses[own], wrong)
    order = np.lexsort((-apart, np.isnan(above), ~suspect))  # the last key is the first
    return Verdict(order, int(suspect.sum()), above)


def _least_loss(losses: NDArray[np.floating], wrong: NDArray[np.floating]) -> float:
    """Loss from which the rows of a source are suspect; infinite if none is.

    Args:
        losses: (R,) of the rows.
        wrong: (D,) of the decoys, ascending.
    """
    count = len(wrong)
    if count < _DECOYS or not len(losses):
        return np.inf
    places = np.arange(*(round(part * count) for part in _MIDDLE))
    rows = np.sort(losses)
    reaching = 1 - np.searchsorted(rows, wrong[places]) / len(rows)
    share = float((reaching / (1 - np.searchsorted(wrong, wrong[places]) / count)).min())
    if share < _LEAST:
        return np.inf
    expected = share * len(rows) * (1 - np.searchsorted(wrong, rows) / count)
    enough = (expected >= WRONG * (len(rows) - np.searchsorted(rows, rows))) & (rows >= wrong[0])
    return float(rows[enough.argmax()]) if enough.any() else np.inf
