"""Fewer channels for an MLP, where those that stay take over what the dropped ones wrote *(ours, not the papers')*.

SCP (`scp.py`) leaves the kept columns of the write matrix d as they were. Here they are fitted anew to what the whole
matrix wrote on the calibration rows, and a channel's score is what its dropping costs after that. With A_δ = A + δ I,
δ a fraction of the median of A's diagonal, and the kept and dropped channels K and R:

    refit    d̂ = d[:, K] + d[:, R] A[R, K] A_δ[K, K]⁻¹          the least of  E‖d x − d̂ x_K‖² + δ ‖d − d̂‖²
    change   δ_j = −d_j a_jᵀ / [A_δ⁻¹]_jj,  a_j = A_δ⁻¹ e_j       of d, where channel j alone is dropped
    score    ⟨δ_j, H δ_j⟩ − λ ⟨D, δ_j⟩,  ⟨δ_j, H δ_j⟩ = d_jᵀ G d_j / [A_δ⁻¹]_jj  with A_δ for A in H

No change of d that drops channel j costs less than δ_j (Hassibi and Stork, "Optimal Brain Surgeon", NeurIPS 1992).
ZipLM (Kurtic, Frantar and Alistarh, NeurIPS 2023, arXiv 2302.04089) prunes a transformer's structures so, for the error
of the output alone (G = I) and one after the other; here G weighs in, and all columns are chosen at once.
The median *(ours)*, since a few channels may be so large that the mean is theirs: one of SmolLM2's layer 11 has 89 % of
the trace, and a damping by the mean drowns all others. Channels that never move are left out of the median.
The rows of the read matrices have no part in the score: they go without any further change of what the MLP writes.
Scores are for one channel alone; the fit is made once, for all that are dropped.

`correct` *(ours)* is for a matrix that follows compressed ones, and reads x̂ where the base's reads x. Before anything
is taken out of it, it is fitted to write what the base's writes; Â = E[x̂ x̂ᵀ]:

    correct  W′ = W + W E[(x − x̂) x̂ᵀ] Â_δ⁻¹                        the least of  E‖W x − W′ x̂‖² + δ ‖W − W′‖²

`refit` of W′ with Â is then the least of E‖W x − d̂ x̂_K‖² + δ ‖W_K − d̂‖² in one. He, Zhang and Sun ("Channel pruning for
accelerating very deep neural networks", ICCV 2017, arXiv 1707.06168) fit a layer on what the pruned ones below give so;
what the shortcut around the matrix carries is not made up for here, since some families have a norm between.

Symbols: d `write_OC`, d_j its column of channel j. A, G, D, H, λ as in `kfac`, of d.
Shapes: C channels, O outputs, K channels kept, R dropped.
"""

import torch
from torch import Tensor

from siftune.errors import ModelError
from siftune.offsite.maths.kfac import Curvature, Moments, moments, score

DAMPING = 0.1  # relative; a thousand tokens tell little of how 1536 channels go together, and less would fit noise


def refit_scores(write_OC: Tensor, curvature: Curvature, lam: float, damping: float = DAMPING) -> Tensor:
    """Score channels by what dropping one costs once the others are fitted; high ones should stay.

    Args:
        write_OC: d, the weight of the matrix that writes to the hidden state.
        curvature: Of d.
        lam: λ, the weight of the loss gap.
        damping: Of A, relative to the median of its diagonal; above 0.

    Returns:
        (C,) scores, in the dtype of the curvature.
    """
    write_OC = write_OC.to(curvature.inputs.values.dtype)
    damped = _damped(curvature.inputs, damping)
    if damped is None:
        return write_OC.new_zeros(write_OC.shape[1])
    lower_CC = damped[1]
    del damped  # where there are many channels, one matrix of theirs is large
    one_CC = torch.eye(len(lower_CC), dtype=lower_CC.dtype, device=lower_CC.device)
    # L⁻¹ with L Lᵀ = A_δ, for A_δ⁻¹ = L⁻ᵀ L⁻¹: torch.cholesky_inverse takes a hundred times longer on processors.
    root_CC = torch.linalg.solve_triangular(lower_CC, one_CC, upper=False).to(write_OC.dtype)
    share_C = root_CC.square().sum(0).reciprocal()
    cost_C = (write_OC * curvature.gradients.times(write_OC)).sum(0) * share_C
    rise_C = -(write_OC * (curvature.slope_OI @ root_CC.T @ root_CC)).sum(0) * share_C
    return score(cost_C, rise_C, lam)


def refit(write_OC: Tensor, inputs: Moments, kept_K: Tensor, damping: float = DAMPING) -> Tensor:
    """Fit the kept columns of a write matrix to what all of them wrote.

    Args:
        write_OC: d.
        inputs: A, of the channels' activations.
        kept_K: (K,) int64 channels that stay, ascending.
        damping: Of A, relative to the median of its diagonal; above 0.

    Returns:
        d̂, (O, K), in float32, or float64 where A is. Solved in float64.
    """
    dtype = inputs.values.dtype
    damped = _damped(inputs, damping)
    if damped is None:
        return write_OC[:, kept_K].to(dtype)
    damped_CC = damped[0]
    dropped = torch.ones(len(damped_CC), dtype=torch.bool, device=kept_K.device)
    dropped[kept_K] = False
    lower_KK = torch.linalg.cholesky(damped_CC[kept_K][:, kept_K])
    taken_KR = torch.cholesky_solve(damped_CC[kept_K][:, dropped], lower_KK)
    write_OC = write_OC.double()
    return (write_OC[:, kept_K] + write_OC[:, dropped] @ taken_KR.T).to(dtype)


def correct(weight_OI: Tensor, whole_NI: Tensor, seen_NI: Tensor, damping: float = DAMPING) -> Tensor:
    """Fit a matrix that reads other inputs than the base's does to what that one writes.

    Args:
        weight_OI: W.
        whole_NI: x, what the base's reads.
        seen_NI: x̂, what this one reads, row by row of the same tokens.
        damping: Of Â, relative to the median of its diagonal; above 0.

    Returns:
        W′, (O, I), in float32, or float64 where x̂ is. Solved in float64. W itself where x̂ is x.
    """
    damped = _damped(moments(seen_NI), damping)
    weight_OI = weight_OI.to(seen_NI.dtype)
    if damped is None:
        return weight_OI
    missed_NO = (whole_NI - seen_NI) @ weight_OI.T
    slope_OI = missed_NO.T.double() @ seen_NI.double() / len(seen_NI)
    return weight_OI + torch.cholesky_solve(slope_OI.T, damped[1]).T.to(seen_NI.dtype)


def _damped(inputs: Moments, damping: float) -> tuple[Tensor, Tensor] | None:
    """A_δ and its Cholesky factor, in float64; None where A is zero: nothing comes in, so nothing is written.

    A was summed in float32, and a channel that is very large leaves an error there that may exceed the damping. Where
    A_δ is not positive definite, the damping is raised tenfold until it is.

    Raises:
        ModelError: A holds a number that is not finite, which no damping mends.
    """
    matrix_CC = inputs.dense().to(torch.float64, copy=True)
    if not matrix_CC.isfinite().all():
        raise ModelError("an MLP's activations on the calibration rows are not finite: try --dtype float32")
    moving_C = matrix_CC.diagonal()[matrix_CC.diagonal() > 0]
    if not len(moving_C):
        return None
    step, bare_C = moving_C.median(), matrix_CC.diagonal().clone()
    while True:
        matrix_CC.diagonal().copy_(bare_C + damping * step)
        lower_CC, failed = torch.linalg.cholesky_ex(matrix_CC)
        if not failed:
            return matrix_CC, lower_CC
        damping = max(10 * damping, 1e-14)
