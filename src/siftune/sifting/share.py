"""Share of wrong rows, bounded by comparison with decoys.

A decoy is a row with the completion of another row: a wrong row, made on purpose. Under one model, each row and each
decoy has a score that is high for wrong rows. If a share q of the rows is wrong, and wrong rows have scores like those
of decoys, then for every score t

    P(row ≥ t) = q P(decoy ≥ t) + (1 - q) P(correct row ≥ t) ≥ q P(decoy ≥ t)

so each ratio of the two shares bounds q from above. The least, over the middle scores of decoys, is close to q if few
correct rows reach these. If wrong rows are harder to tell from correct ones than decoys are, it is too small. Mixture
proportions are bounded like that by Blanchard, Lee and Scott (JMLR 2010), and decoys count wrong matches in mass
spectrometry (Elias and Gygi, Nature Methods 2007). Decoys of rows are ours.
"""

import numpy as np
from numpy.typing import NDArray

_MIDDLE = (0.3, 0.7)  # shares of decoys between which t lies: few are beyond (ours)


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
