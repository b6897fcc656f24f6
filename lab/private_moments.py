"""Curvature with differential privacy for calibration rows: clipped tokens and Gaussian noise *(ours)*.

Compression looks at calibration rows through A and G alone (`kfac`; with λ = 0, D has no part in it). So noise on these
bounds whatever is made of them. Each token's x is scaled down to a norm of at most C, and the sum gets a symmetric
matrix of normal numbers:

    M̃ = (1/N) ( Σ_n c_n x_n c_n x_nᵀ + σ T C² E ),   c_n = min(1, C/‖x_n‖),   E_ij = E_ji ~ 𝒩(0, 1)

A row of at most T tokens changes the sum by at most T C² (Frobenius norm of its part); so M̃ is a Gaussian mechanism of
noise multiplier σ for the addition or removal of a row (C, N and T are taken as known, and must not be read off the
rows). Negative eigenvalues of M̃ are then set to zero, which costs nothing.

The entries below the diagonal repeat those above, so that the norm over independent entries is below the Frobenius
norm; the bound holds all the more.

k such matrices with one σ are as good as one of σ/√k, and for sensitivity over standard deviation μ = √k/σ the least δ
is known in closed form (Balle and Wang, "Improving the Gaussian mechanism for differential privacy", ICML 2018,
arXiv 1805.06530, theorem 8; that Gaussian mechanisms compose so: Dong et al., "Gaussian differential privacy", 2019,
arXiv 1905.02383, corollary 3.3):

    δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ)

Symbols: x `rows_NF`, C `clip`, T `row_tokens`, σ `noise`, k `releases`.
Shapes: N tokens, F features.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from siftune.base.numerics import widened
from siftune.offsite.maths.kfac import Moments

_MOST = 1e6  # an ε that says nothing


def private_moments(rows_NF: Tensor, clip: float, noise: float, row_tokens: int, generator: torch.Generator) -> Moments:
    """Second moment of rows with Gaussian noise.

    Args:
        rows_NF: (N, F) inputs, or output gradients, of the real tokens of all calibration rows.
        clip: C, above 0.
        noise: σ; 0 leaves the noise out, and the bound.
        row_tokens: T, the most tokens that one calibration row has.
        generator: Source of the noise, on the device of the rows.

    Returns:
        M̃, formed, in float32, or float64 where the rows are; positive semi-definite.
    """
    clipped_NF = clipped(rows_NF, clip)
    total_FF = clipped_NF.T @ clipped_NF
    drawn_FF = torch.randn(total_FF.shape, dtype=total_FF.dtype, device=total_FF.device, generator=generator)
    upper_FF = drawn_FF.triu()
    total_FF = total_FF + noise * row_tokens * clip**2 * (upper_FF + upper_FF.triu(1).T)
    return Moments(_semi_definite(total_FF / max(len(rows_NF), 1)), True)


def clipped(rows_NF: Tensor, clip: float) -> Tensor:
    """Rows scaled down to a norm of at most `clip`; (N, F) in float32, or float64 where they are."""
    rows_NF = widened(rows_NF)
    norms_N1 = rows_NF.norm(dim=1, keepdim=True)
    scaled_NF: Tensor = rows_NF * (clip / norms_N1.clamp(min=clip))
    return scaled_NF


def gaussian_delta(epsilon: float, noise: float, releases: int = 1) -> float:
    """The least δ for an ε.

    Args:
        epsilon: ε, at least 0.
        noise: σ, above 0.
        releases: k, how many moments are made of the same rows.
    """
    mu = math.sqrt(releases) / noise
    normal = NormalDist()
    upper, lower = (normal.cdf(sign * mu / 2 - epsilon / mu) for sign in (1, -1))
    # e^ε overflows before Φ, which is below e^−ε there, is zero
    tail = math.exp(epsilon + math.log(lower)) if lower > 0 else 0.0
    return max(0.0, upper - tail)


def gaussian_epsilon(delta: float, noise: float, releases: int = 1) -> float:
    """The least ε for a δ, by bisection, rounded up; infinite where it is above a million, or nothing bounds it.

    Args:
        delta: δ, above 0 and below 1.
        noise: σ; 0 has no bound.
        releases: k.

    Example:
        >>> round(gaussian_epsilon(1e-5, noise=1.0), 2)
        4.38
    """
    if noise <= 0 or gaussian_delta(_MOST, noise, releases) > delta:
        return math.inf
    low, high = 0.0, _MOST
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, noise, releases) > delta else (low, middle)
    return high


def _semi_definite(matrix_FF: Tensor) -> Tensor:
    """Negative eigenvalues set to zero; in float64, for small ones beside large."""
    value_F, vector_FF = torch.linalg.eigh(matrix_FF.double())
    projected_FF: Tensor = (vector_FF * value_F.clamp(min=0)) @ vector_FF.T
    return projected_FF.to(matrix_FF.dtype)
