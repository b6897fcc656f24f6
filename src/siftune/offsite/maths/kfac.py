"""KFAC — Kronecker-factored curvature of a matrix, and the score that GradOT reads off it.

Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015 (arXiv
1503.05671); for matrices that see many tokens, the variant "expand" of Eschenhagen et al., NeurIPS 2023 (arXiv
2311.00636), of the empirical Fisher. GradOT, "Training-free gradient-preserving offsite-tuning", ACL 2025 (arXiv
2507.04455), takes it for the Hessian. For y = W x, x_n the input and g_n = ∂ℓ/∂y_n the output gradient of token n, ℓ
the sum of the token losses:

    factors   A = (1/N) Σ_n x_n x_nᵀ        G = (1/N) Σ_n g_n g_nᵀ
    slope     D = ∂ℓ/∂W = Σ_n g_n x_nᵀ
    product   H vec(δ) = vec(G δ A)
    GCS       ‖H δ‖₁ − λ ⟨D, δ⟩             of a change δ of W, ‖·‖₁ the sum of absolute values

A piece of W whose dropping has a high GCS (gradient-preserving compression score) should stay: the gradients would
shift (first term) more than the loss would rise (second term; a rise keeps the data owner from using the emulator).

Symbols: A `inputs`, G `gradients`, D `slope_OI`, H `apply`, λ `lam`.
Shapes: N tokens, F features (I inputs or O outputs), K columns, C candidates (pieces of W that may be dropped).

What a caller must see to: rows are those of real tokens. Rows of padding have inputs, which would count in A. Rows of
zeros on both sides only divide A and G by a constant, and the mean loss instead of the summed one only scales G and D;
neither changes anything whitened, nor `score` in the unit "relative".

Ours, not the papers': either term of the GCS is divided by its mean absolute value over the candidates before λ
applies, because one grows with the square of the gradients and the other does not ("relative"; "paper" leaves both
as they are, and is then a λ of sums over all tokens in D and of means in A and G); with fewer tokens than features
the factors are kept as tokens and never formed; damping is relative to the mean of the diagonal.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from siftune.base.errors import ModelError
from siftune.base.numerics import as_before, in_float64, widened

LambdaUnit = Literal["relative", "paper"]

DAMPING = 1e-3  # relative; far above the rounding of float32, far below the directions that matter

_BLOCK = 512  # columns formed at a time where the matrix must not be


@dataclass(frozen=True)
class Moments:
    """An uncentred second moment M = (1/N) Σ_n x_n x_nᵀ, symmetric (F, F)."""

    values: Tensor  # M itself; or the rows x_n/√N, (N, F), whose product with themselves it is
    formed: bool  # whether `values` is M

    @property
    def features(self) -> int:
        """F."""
        return self.values.shape[1]

    def times(self, v_FK: Tensor) -> Tensor:
        """M v; (F, K), in the dtype of the moments."""
        v_FK = v_FK.to(self.values.dtype)
        return self.values @ v_FK if self.formed else self.values.T @ (self.values @ v_FK)

    def column_norms(self) -> Tensor:
        """‖M[:, j]‖₁ of every column; (F,)."""
        return torch.cat([block.abs().sum(0) for block in self._blocks()])

    def dense(self) -> Tensor:
        """M; (F, F)."""
        return self.values if self.formed else self.values.T @ self.values

    def root(self, damping: float = DAMPING) -> Tensor:
        """L, lower triangular (F, F), with L Lᵀ = M + damping · (trace M / F) · I; I where M is zero.

        By Cholesky in float64. Where rounding leaves the damped matrix not positive definite, the damping is raised
        tenfold until it is.

        Args:
            damping: At least 0.

        Returns:
            L in the dtype of the moments.
        """
        matrix_FF = in_float64(self.dense())
        mean = matrix_FF.diagonal().mean()
        one_FF = torch.eye(self.features, dtype=matrix_FF.dtype, device=matrix_FF.device)
        if mean == 0:  # nothing is known: every direction counts the same
            return as_before(one_FF, self.values)
        while True:
            lower_FF: Tensor
            lower_FF, failed = torch.linalg.cholesky_ex(matrix_FF + damping * mean * one_FF)
            if not failed:
                return as_before(lower_FF, self.values)
            damping = max(10 * damping, 1e-14)

    def _blocks(self) -> Iterator[Tensor]:
        for columns in torch.split(self.values, _BLOCK, 1):
            yield columns if self.formed else self.values.T @ columns


@dataclass(frozen=True)
class Curvature:
    """Curvature and slope of the loss around a matrix W."""

    inputs: Moments  # A, over I features
    gradients: Moments  # G, over O features
    slope_OI: Tensor  # D, the gradient for W


class MomentSum:
    """The second moment of rows that come in parts: a sum, or the rows themselves where they are fewer than features.

    Args:
        count: N, number of all rows; without any, M is zero.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._parts: list[Tensor] = []  # one sum; or all rows

    def add(self, rows_NF: Tensor) -> None:
        """Add some rows, (n, F), of any float dtype."""
        rows_NF = widened(rows_NF)
        if not self._formed(rows_NF.shape[1]):
            self._parts.append(rows_NF)
        elif self._parts:
            self._parts[0].addmm_(rows_NF.T, rows_NF)
        else:
            self._parts.append(rows_NF.T @ rows_NF)

    def moments(self) -> Moments:
        """M, once all rows are added; in float32, or float64 where the rows are.

        Raises:
            ModelError: A value, or its square in the dtype of the sums, is NaN or infinite.
        """
        features, count = self._parts[0].shape[1], max(self._count, 1)
        formed = self._formed(features)
        values = self._parts[0] / count if formed else torch.cat(self._parts) / math.sqrt(count)
        sizes = values if formed else values.square()
        if not sizes.isfinite().all():  # a bad number reaches the diagonal, and the matrix is smaller
            raise ModelError(
                "the calibration rows give activations or gradients that are NaN or infinite, so that no curvature can "
                "be had from them; load the model in float32, or check its weights"
            )
        return Moments(values, formed)

    def _formed(self, features: int) -> bool:
        return self._count >= features


def apply(curvature: Curvature, delta_OI: Tensor) -> Tensor:
    """H δ = G δ A, the shift of the gradient for W that a change δ of W brings; (O, I)."""
    return curvature.gradients.times(curvature.inputs.times(delta_OI.T).T)


def score(shift_C: Tensor, rise_C: Tensor, lam: float, unit: LambdaUnit = "relative") -> Tensor:
    """The GCS of dropping candidates; high ones should stay.

    Args:
        shift_C: (C,) ‖H δ‖₁.
        rise_C: (C,) ⟨D, δ⟩, by how much the loss rises to first order.
        lam: λ; 0 ranks by the shift alone.
        unit: Of λ: relative to the terms' mean absolute values *(ours)*, or as in the paper.

    Returns:
        (C,) shift/mean|shift| − λ · rise/mean|rise|; a term that is zero for all counts as zero. In the paper's unit
        shift − λ · rise.

    Example:
        >>> score(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 4.0]), 0.5).tolist()
        [0.0, 1.0]
        >>> score(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 4.0]), 0.5, "paper").tolist()
        [-1.0, 1.0]
    """
    if unit == "paper":
        return shift_C - lam * rise_C
    return _relative(shift_C) - lam * _relative(rise_C)


def _relative(term_C: Tensor) -> Tensor:
    mean = term_C.abs().mean()
    return term_C / torch.where(mean == 0, 1.0, mean)
