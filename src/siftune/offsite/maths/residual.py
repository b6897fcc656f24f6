"""What compression leaves out of a matrix's output, row by row: small on the rows that it was fitted to *(ours)*.

A kit's matrix Ŵ was chosen to write what the base's W wrote on the calibration rows. So whoever has W can look at a
candidate row's tokens x_t, take the channels x_t,K that the kit kept (all of them for a factored matrix), and ask how
much is lost there:

    residual    ln Σ_t ‖W x_t − Ŵ x_t,K‖² − ln Σ_t ‖W x_t‖²      over the real tokens t of a row

The lower a row's residual beside those of other rows of its kind, the likelier it is a calibration row. Logarithms,
so that the mean over matrices does not hang on the one that loses most.

Symbols: W x `whole_BTO`, Ŵ x_K `kept_BTO`.
Shapes: B rows, T positions, O outputs.
"""

import torch
from torch import Tensor

_FLOOR = 1e-12  # relative: what float32 loses; a matrix that left nothing out tells nothing apart


def residuals(whole_BTO: Tensor, kept_BTO: Tensor, real_BT: Tensor) -> Tensor:
    """Share of a matrix's output that its compressed form leaves out, of every row, in logarithms.

    Args:
        whole_BTO: What the base's matrix writes.
        kept_BTO: What the kit's writes from the same inputs.
        real_BT: bool; false on padding. Every row has a real token.

    Returns:
        (B,) float64; ln 1e-12 where nothing is lost, and where nothing is written.
    """
    lost_BT = (whole_BTO - kept_BTO).double().square().sum(-1)
    size_BT = whole_BTO.double().square().sum(-1)
    lost_B, size_B = ((part_BT * real_BT).sum(-1) for part_BT in (lost_BT, size_BT))
    share_B = torch.where(size_B > 0, lost_B / size_B, 0.0)
    return share_B.clamp(min=_FLOOR).log()
