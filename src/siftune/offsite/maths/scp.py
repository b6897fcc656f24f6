"""SCP — Selective Channel Pruning: fewer channels for an MLP.

From GradOT, "Training-free gradient-preserving offsite-tuning", ACL 2025, arXiv 2507.04455. A channel is a row of
every matrix that reads the hidden state (up, and gate where there is one) and a column of the one that writes to it
(down). Dropping channel j takes all of them away, and its GCS (see `kfac`) is the sum of theirs; each is of rank one,
so that its 1-norm is a product of 1-norms. With row w_j of a read matrix W and column d_j of the write matrix:

    score_j = Σ_W ‖G_W[:, j]‖₁ ‖A_W w_j‖₁ + ‖G_d d_j‖₁ ‖A_d[j, :]‖₁ + λ (Σ_W ⟨D_W[j], w_j⟩ + ⟨D_d[:, j], d_j⟩)

Symbols: W `reads`, d `writes`. A, G, D, λ as in `kfac`.
Shapes: C channels, I inputs of the MLP, O outputs.

Ours, not the paper's: either sum is relative to its mean absolute value over the channels (`kfac.score`). Biases
follow their channel without a part in the score.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from siftune.offsite.maths.kfac import Curvature, score


def channel_scores(reads: Sequence[tuple[Tensor, Curvature]], writes: tuple[Tensor, Curvature], lam: float) -> Tensor:
    """Score channels; high ones should stay.

    Args:
        reads: (C, I) weight and curvature of every matrix that reads the hidden state.
        writes: (O, C) weight and curvature of the matrix that writes to it.
        lam: λ, the weight of the loss gap.

    Returns:
        (C,) scores.
    """
    parts = [_row_terms(weight_CI, curvature) for weight_CI, curvature in reads]
    parts.append(_column_terms(*writes))
    shifts, slopes = zip(*parts, strict=True)
    return score(torch.stack(shifts).sum(0), -torch.stack(slopes).sum(0), lam)


def keep_channels(scores_C: Tensor, count: int) -> Tensor:
    """The channels with the highest scores; (count,) int64, ascending, so that their order doesn't tell the scores."""
    return scores_C.argsort(descending=True, stable=True)[:count].sort().values


def _row_terms(weight_CI: Tensor, curvature: Curvature) -> tuple[Tensor, Tensor]:
    input_norms_C = curvature.inputs.times(weight_CI.T).abs().sum(0)
    slopes_C = (weight_CI * curvature.slope_OI).sum(1)
    return curvature.gradients.column_norms() * input_norms_C, slopes_C


def _column_terms(weight_OC: Tensor, curvature: Curvature) -> tuple[Tensor, Tensor]:
    gradient_norms_C = curvature.gradients.times(weight_OC).abs().sum(0)
    slopes_C = (weight_OC * curvature.slope_OI).sum(0)
    return gradient_norms_C * curvature.inputs.column_norms(), slopes_C
