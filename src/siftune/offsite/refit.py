"""Fewer channels for an MLP, where those that stay take over what the dropped ones wrote *(ours, not the papers')*.

SCP (`scp.py`) leaves the kept columns of the write matrix d as they were. Here they are fitted anew to what the whole
matrix wrote on the calibration rows, and a channel's score is what its dropping costs after that. With A_δ = A + δ I,
δ a fraction of the mean of A's diagonal, and the kept and dropped channels K and R:

    refit    d̂ = d[:, K] + d[:, R] A[R, K] A_δ[K, K]⁻¹          the least of  E‖d x − d̂ x_K‖² + δ ‖d − d̂‖²
    change   δd = −d_j a_jᵀ / [A_δ⁻¹]_jj,  a_j = A_δ⁻¹ e_j       of d, where channel j alone is dropped
    cost_j   d_jᵀ G d_j / [A_δ⁻¹]_jj + Σ_W G_W[j, j] w_jᵀ A_W w_j
    score_j  cost_j − λ · rise_j,  either relative to its mean absolute value (`kfac.score`)

The first term of the cost is ⟨δd, H δd⟩ with A_δ for A, the least that any change of d which drops channel j can cost
(Hassibi and Stork, "Optimal Brain Surgeon", NeurIPS 1992); the second is the same of the read matrices, whose rows go
without anything in their place. Both are in the unit of the loss, so that no weight stands between them. Costs of
several channels are taken for the sum of their own; fitting is done once, for all that are dropped.

Symbols: W `reads`, d `writes`, w_j and d_j its row and column of channel j. A, G, D, λ as in `kfac`.
Shapes: C channels, I inputs of the MLP, O outputs, K channels kept, R dropped.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from siftune.offsite.kfac import Curvature, Moments, score

DAMPING = 0.1  # relative; a thousand rows of text tell little of how 1536 channels go together, and less fits noise


def refit_scores(
    reads: Sequence[tuple[Tensor, Curvature]], writes: tuple[Tensor, Curvature], lam: float, damping: float = DAMPING
) -> Tensor:
    """Score channels by what dropping one costs once the others are fitted; high ones should stay.

    Args:
        reads: (C, I) weight and curvature of every matrix that reads the hidden state.
        writes: (O, C) weight and curvature of the matrix that writes to it.
        lam: λ, the weight of the loss gap.
        damping: Of A of the write matrix, relative to the mean of its diagonal; above 0.

    Returns:
        (C,) scores, in the dtype of the curvature.
    """
    write_OC, curvature = writes
    write_OC = write_OC.to(curvature.inputs.values.dtype)
    damped_CC = _damped(curvature.inputs, damping)
    cost_C = rise_C = write_OC.new_zeros(write_OC.shape[1])  # nothing comes in: nothing is written, nothing lost
    if damped_CC is not None:
        inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(damped_CC)).to(write_OC.dtype)
        share_C = inverse_CC.diagonal().reciprocal()
        cost_C = _forms(curvature.gradients, write_OC) * share_C
        rise_C = -(write_OC * (curvature.slope_OI @ inverse_CC)).sum(0) * share_C
    for weight_CI, seen in reads:
        weight_CI = weight_CI.to(write_OC.dtype)
        cost_C = cost_C + seen.gradients.diagonal() * _forms(seen.inputs, weight_CI.T)
        rise_C = rise_C - (weight_CI * seen.slope_OI).sum(1)
    return score(cost_C, rise_C, lam)


def refit(write_OC: Tensor, inputs: Moments, kept_K: Tensor, damping: float = DAMPING) -> Tensor:
    """Fit the kept columns of a write matrix to what all of them wrote.

    Args:
        write_OC: d, (O, C).
        inputs: A, of the channels' activations.
        kept_K: (K,) int64 channels that stay, ascending.
        damping: Of A, relative to the mean of its diagonal; above 0.

    Returns:
        d̂, (O, K), in float32, or float64 where A is. Solved in float64.
    """
    dtype = inputs.values.dtype
    damped_CC = _damped(inputs, damping)
    if damped_CC is None:
        return write_OC[:, kept_K].to(dtype)
    dropped = torch.ones(len(damped_CC), dtype=torch.bool, device=kept_K.device)
    dropped[kept_K] = False
    lower_KK = torch.linalg.cholesky(damped_CC[kept_K][:, kept_K])
    taken_KR = torch.cholesky_solve(damped_CC[kept_K][:, dropped], lower_KK)
    write_OC = write_OC.double()
    return (write_OC[:, kept_K] + write_OC[:, dropped] @ taken_KR.T).to(dtype)


def _damped(inputs: Moments, damping: float) -> Tensor | None:
    """A_δ in float64; None where A is zero."""
    matrix_CC = inputs.dense().double()
    mean = matrix_CC.diagonal().mean()
    if mean == 0:
        return None
    return matrix_CC + damping * mean * torch.eye(len(matrix_CC), dtype=matrix_CC.dtype, device=matrix_CC.device)


def _forms(moments: Moments, v_FK: Tensor) -> Tensor:
    """vᵀ M v of every column v; (K,)."""
    return (v_FK * moments.times(v_FK)).sum(0)
