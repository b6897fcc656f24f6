"""Fewer channels for an MLP: SCP, the paper's, and a fit of the remaining channels *(ours)*.

**SCP, Selective Channel Pruning.** From GradOT, "Training-free gradient-preserving offsite-tuning", ACL 2025, arXiv
2507.04455. A channel is a row of every matrix that reads the hidden state (up, and gate where there is one) and a
column of the one that writes to it (down). Dropping channel j removes all of them, and its GCS (see `kfac`) is the sum
of theirs; each is of rank one, so that its 1-norm is a product of 1-norms. With row w_j of a read matrix W and column
d_j of the write matrix:

    score_j = Σ_W ‖G_W[:, j]‖₁ ‖A_W w_j‖₁ + ‖G_d d_j‖₁ ‖A_d[j, :]‖₁ + λ (Σ_W ⟨D_W[j], w_j⟩ + ⟨D_d[:, j], d_j⟩)

Ours, not the paper's: either sum is relative to its mean absolute value over the channels (`kfac.score`). Biases
follow their channel without a part in the score.

**Refit** *(ours)*. SCP leaves the remaining columns of d unchanged. Here they are fitted to what the complete matrix
wrote on the calibration rows, and a channel's score is the cost of dropping it after the fit. With A_δ = A + δ I, δ a
fraction of the median of A's diagonal, and the kept and dropped channels K and R:

    refit    d̂ = d[:, K] + d[:, R] A[R, K] A_δ[K, K]⁻¹          the least of  E‖d x − d̂ x_K‖² + δ ‖d − d̂‖²
    change   δ_j = −d_j a_jᵀ / [A_δ⁻¹]_jj,  a_j = A_δ⁻¹ e_j       of d, where channel j alone is dropped
    score    ⟨δ_j, H δ_j⟩ − λ ⟨D, δ_j⟩,  ⟨δ_j, H δ_j⟩ = d_jᵀ G d_j / [A_δ⁻¹]_jj  with A_δ for A in H

No change of d that drops channel j costs less than δ_j (Hassibi and Stork, "Optimal Brain Surgeon", NeurIPS 1992).
ZipLM (Kurtic, Frantar and Alistarh, NeurIPS 2023, arXiv 2302.04089) prunes a transformer's structures in this way, for
the error of the output alone (G = I) and one after the other. Here G counts too, and all columns are chosen at once.
The fit itself is a ridge regression, as in GRAIL (Tang et al., arXiv 2602.23795) and CORP (Zhang and Yang, arXiv
2602.05243), which also fold it into the write matrix, for channels chosen in other ways.
The damping is by the median, since a few channels may be so large that the mean is theirs: one of SmolLM2's layer 11
has 89 % of the trace. Channels that never move are left out of the median. Where A was summed in float32, its diagonal
grows by 1e-5 of itself, more than rounding took (`_widened`).
If there are fewer tokens than channels, A is rows X with A = Xᵀ X, and A_δ⁻¹ = (I − Xᵀ (δ I + X Xᵀ)⁻¹ X) / δ
(Woodbury): no matrix of channels by channels is formed, the largest of all in a large model. Where tokens are few,
costs need none either (`costs_of_counts`).
The rows of the read matrices have no part in the score: dropping them changes nothing else of what the MLP writes.
Scores are for one channel alone; the fit is made once, for all dropped channels.

Symbols: W `reads`, d `writes` and `write_OC`, d_j its column of channel j. A, G, D, H, λ as in `kfac`, of d.
Shapes: C channels, I inputs of the MLP, O outputs, K channels kept, R dropped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from siftune.base.errors import ModelError
from siftune.base.numerics import as_before, in_float64
from siftune.offsite.maths.kfac import Curvature, LambdaUnit, Moments, score


def channel_scores(
    reads: Sequence[tuple[Tensor, Curvature]],
    writes: tuple[Tensor, Curvature],
    lam: float,
    unit: LambdaUnit = "relative",
) -> Tensor:
    """Score channels; high ones should stay.

    Args:
        reads: (C, I) weight and curvature of every matrix that reads the hidden state.
        writes: (O, C) weight and curvature of the matrix that writes to it.
        lam: λ, the weight of the loss gap.
        unit: Of λ.

    Returns:
        (C,) scores.
    """
    parts = [_row_terms(weight_CI, curvature) for weight_CI, curvature in reads]
    parts.append(_column_terms(*writes))
    shifts, slopes = zip(*parts, strict=True)
    return score(torch.stack(shifts).sum(0), -torch.stack(slopes).sum(0), lam, unit)


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


DAMPING = 0.1  # relative; a thousand tokens tell little of how 1536 channels go together, and less would fit noise


def refit_scores(
    write_OC: Tensor, curvature: Curvature, lam: float, damping: float = DAMPING, unit: LambdaUnit = "relative"
) -> Tensor:
    """Score channels by what dropping one costs once the others are fitted; high ones should stay.

    Args:
        write_OC: d, the weight of the matrix that writes to the hidden state.
        curvature: Of d.
        lam: λ, the weight of the loss gap.
        damping: Of A, relative to the median of its diagonal; above 0.
        unit: Of λ.

    Returns:
        (C,) scores, in the dtype of the curvature.
    """
    dtype = curvature.inputs.values.dtype
    damped = _damped(curvature.inputs, damping)
    if damped is None:
        return write_OC.new_zeros(write_OC.shape[1], dtype=dtype)
    write_OC = write_OC.to(dtype)
    share_C = as_before(damped.inverse_diagonal().reciprocal(), write_OC)
    cost_C = (write_OC * curvature.gradients.times(write_OC)).sum(0) * share_C
    rise_C = 0 * cost_C
    if lam:
        rise_C = -(write_OC * as_before(damped.solve(curvature.slope_OI.T).T, write_OC)).sum(0) * share_C
    return score(cost_C, rise_C, lam, unit)


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
    dtype, step = inputs.values.dtype, _step(inputs)
    if step is None:
        return write_OC[:, kept_K].to(dtype)
    fitted = write_OC.new_empty(0, dtype=dtype)  # where the result belongs
    write_OC, values = in_float64(write_OC), _widened(inputs).values
    kept_K = kept_K.to(values.device)
    dropped = torch.ones(inputs.features, dtype=torch.bool, device=values.device)
    dropped[kept_K] = False
    if inputs.formed:
        part, lost_KO = values[kept_K][:, kept_K], values[kept_K][:, dropped] @ write_OC[:, dropped].T
    else:
        part = values[:, kept_K]
        lost_KO = part.T @ (values[:, dropped] @ write_OC[:, dropped].T)
    damped = _raised(Moments(part, inputs.formed), damping, step)
    return as_before(write_OC[:, kept_K] + damped.solve(lost_KO).T, fitted)


def costs_of_counts(
    write_OC: Tensor,
    other: Curvature,
    scores_C: Tensor,
    counts: Sequence[int],
    fit: Moments | None,
    damping: float = DAMPING,
) -> list[float]:
    """The loss of keeping the best channels, for several counts: ⟨δ, H δ⟩ of the change δ of d.

    Args:
        write_OC: d.
        other: Curvature of d that costs are measured in, which need not be that of the fit; not damped.
        scores_C: (C,) scores.
        counts: Channels to keep, each from 1 to C.
        fit: A of the fit of the channels that stay; None leaves them unchanged.
        damping: Of that, as for `refit`.

    Returns:
        A cost for every count, computed in float64.
    """
    order_C, channels = scores_C.argsort(descending=True, stable=True), write_OC.shape[1]
    write_OC, inputs = in_float64(write_OC[:, order_C]), _reordered(other.inputs, order_C)
    outputs = Moments(in_float64(other.gradients.values), other.gradients.formed)
    step = None if fit is None else _step(fit)  # where nothing comes in, nothing is fitted
    solution = None if fit is None or step is None else (_reordered(_widened(fit), order_C), damping, step)
    blocks = list(pairwise(sorted({channels, *counts}, reverse=True)))
    rows = [inputs] if solution is None else [inputs, solution[0]]
    few = all(not one.formed and 3 * len(one.values) <= channels for one in rows)
    costs = (_by_rows if few else _by_factor)(write_OC, inputs, outputs, solution, blocks)
    cost_of = dict(zip((low for _, low in blocks), costs, strict=True))
    return [max(cost_of[count], 0.0) if count < channels else 0.0 for count in counts]


_Fit = tuple[Moments, float, Tensor]  # A, damping, and what that is relative to
_Blocks = Sequence[tuple[int, int]]  # ends and starts of the channels that are dropped one after the other


def _by_factor(
    write_OC: Tensor, inputs: Moments, outputs: Moments, solution: _Fit | None, blocks: _Blocks
) -> Iterator[float]:
    """Costs after each block, from one Cholesky factor of A_δ; if rounding demands more damping, all have it.

    With channels in order of score, A_δ = L Lᵀ and M = L⁻¹, dropping the last block b of those that are left changes d̂
    by −p_b M_b, where p_b = d̂_b M_bb⁻¹. So δ = −Σ_b p_b M_b, and the cost is a sum over the dropped channels i, j of
    (Pᵀ G P)_ij (M A Mᵀ)_ij. Without a fit, P = d and M = I.
    """
    left_OC, parts_OC, cost = write_OC.clone(), torch.zeros_like(write_OC), 0.0
    if solution is None:
        inverse_CC = torch.eye(write_OC.shape[1], dtype=write_OC.dtype, device=write_OC.device)
    else:
        fit, damping, step = solution
        inverse_CC = _raised(Moments(fit.dense(), True), damping, step).inverse_root()
    for high, low in blocks:
        rows_BC = inverse_CC[low:high]
        part_OB = torch.linalg.solve_triangular(rows_BC[:, low:high], left_OC[:, low:high], upper=False, left=False)
        left_OC[:, :low] -= part_OB @ rows_BC[:, :low]
        parts_OC[:, low:high] = part_OB
        both_BD = (outputs.times(part_OB).T @ parts_OC[:, low:]) * (inputs.times(rows_BC.T).T @ inverse_CC[low:].T)
        cost += float(2 * both_BD.sum() - both_BD[:, : high - low].sum())  # with those dropped before, either way
        yield cost


def _by_rows(
    write_OC: Tensor, inputs: Moments, outputs: Moments, solution: _Fit | None, blocks: _Blocks
) -> Iterator[float]:
    """Costs after each block where tokens are few, without a matrix of channels by channels.

    With rows X of the fit and Y of the costs, and the kept and dropped channels K and R, what other tokens lose is
    Y δᵀ = Y_K X_Kᵀ (δ I + X_K X_Kᵀ)⁻¹ X_R d_Rᵀ − Y_R d_Rᵀ (Woodbury).
    """
    y_MC = inputs.values
    x_NC = y_MC[:0] if solution is None else solution[0].values
    kept_NN, seen_MN = x_NC @ x_NC.T, y_MC @ x_NC.T
    lost_NO, missed_MO = (rows.new_zeros(len(rows), len(write_OC)) for rows in (x_NC, y_MC))
    for high, low in blocks:
        x_NB, y_MB, write_BO = x_NC[:, low:high], y_MC[:, low:high], write_OC[:, low:high].T
        kept_NN -= x_NB @ x_NB.T
        seen_MN -= y_MB @ x_NB.T
        lost_NO += x_NB @ write_BO
        missed_MO += y_MB @ write_BO
        change_MO = -missed_MO
        if solution is not None:
            change_MO += seen_MN @ _raised(Moments(kept_NN.clone(), True), *solution[1:]).solve(lost_NO)
        yield float((change_MO * outputs.times(change_MO.T).T).sum())


def _reordered(moments: Moments, order_F: Tensor) -> Moments:
    """The same moments with features in another order, in float64."""
    order_F = order_F.to(moments.values.device)  # moments may be on the CPU already
    values = in_float64(moments.values[:, order_F])
    return Moments(values[order_F.to(values.device)] if moments.formed else values, moments.formed)


@dataclass(frozen=True)
class _Damped:
    """A_δ in float64."""

    values: Tensor  # A_δ itself, (C, C); or X, (N, C)
    lower: Tensor  # Cholesky factor of A_δ, or of δ I + X Xᵀ
    delta: Tensor  # δ
    formed: bool  # whether it is A_δ itself

    def solve(self, b_CK: Tensor) -> Tensor:
        """A_δ⁻¹ b; (C, K)."""
        b_CK = in_float64(b_CK)
        if self.formed:
            return torch.cholesky_solve(b_CK, self.lower)
        known_CK: Tensor = self.values.T @ torch.cholesky_solve(self.values @ b_CK, self.lower)
        return (b_CK - known_CK) / self.delta

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of A_δ⁻¹; (C,)."""
        if not self.formed:
            inner_NC: Tensor = torch.linalg.solve_triangular(self.lower, self.values, upper=False)
            return (1 - inner_NC.square().sum(0)) / self.delta
        # torch.cholesky_inverse takes a hundred times longer on processors
        return self.inverse_root().square().sum(0)

    def inverse_root(self) -> Tensor:
        """L⁻¹, where A_δ = L Lᵀ is formed; (C, C)."""
        root_CC = torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        torch.linalg.solve_triangular(self.lower, root_CC, upper=False, out=root_CC)
        return root_CC


def _damped(inputs: Moments, damping: float) -> _Damped | None:
    """A_δ; None where A is zero: nothing comes in, so nothing is written."""
    step, values = _step(inputs), _widened(inputs).values
    values = values.clone() if values is inputs.values else values
    return None if step is None else _raised(Moments(values, inputs.formed), damping, step)


_ROUNDING = 1e-5  # relative; sums in float32 over 8,201 tokens of SmolLM2 were off by up to 6e-7


def _widened(inputs: Moments) -> Moments:
    """A in float64; with a larger diagonal where it was summed in float32.

    Few channels are a thousand times larger than others, on the same tokens, and nearly parallel. Rounding their sums
    can make such a pair look like one channel, or A indefinite by more than the damping. The pair would then cost
    nothing and be dropped. What is added exceeds rounding, and is far below the damping for all other channels.
    """
    values = in_float64(inputs.values)
    if inputs.formed and inputs.values.dtype == torch.float32:
        values.diagonal().mul_(1 + _ROUNDING)  # of a copy, in another dtype
    return Moments(values, inputs.formed)


def _step(inputs: Moments) -> Tensor | None:
    """The median of A's diagonal, without what is zero; None where all is.

    Raises:
        ModelError: A holds a number that is not finite, which no damping mends.
    """
    if not inputs.values.isfinite().all():
        raise ModelError("an MLP's activations on the calibration rows are not finite: try --dtype float32")
    values = inputs.values
    sizes_C = in_float64(values.diagonal() if inputs.formed else values.square().sum(0))
    moving_C = sizes_C[sizes_C > 0]
    return moving_C.median() if len(moving_C) else None


def _raised(inputs: Moments, damping: float, step: Tensor) -> _Damped:
    """A_δ with δ = damping · step, of A in float64; where A is formed, A_δ takes its place.

    Where A_δ is not positive definite, because of rounding, the damping is raised tenfold until it is.
    """
    values = inputs.values
    matrix = values if inputs.formed else values @ values.T
    bare = matrix.diagonal().clone()
    while True:
        matrix.diagonal().copy_(bare + damping * step)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return _Damped(values, lower, damping * step, inputs.formed)
        damping = max(10 * damping, 1e-14)
