"""DRD — Dynamic Rank Decomposition: fewer rank-one components for an attention matrix.

From GradOT, "Training-free gradient-preserving offsite-tuning", ACL 2025, arXiv 2507.04455. W is a sum of rank-one
components; dropping component k is the change δ = −l_k r_k, whose GCS (see `kfac`) has a closed form, because the
1-norm of an outer product is the product of the 1-norms:

    components   W = U Σ Vᵀ = Σ_k l_k r_k,   l_k = u_k,   r_k = σ_k v_kᵀ,   size σ_k
    score        ‖G l_k‖₁ ‖A r_kᵀ‖₁ + λ ⟨D, l_k r_k⟩
    kept         the top 5 % of all components by size, then those of the highest score
    rank         R = ρ O I / (O + I), which leaves the fraction ρ of the parameters

Symbols: l `left_OK`, r `right_KI`, σ `size_K`, ρ `keep`. A, G, D, λ as in `kfac`.
Shapes: O outputs, I inputs, K = min(O, I) components, R of them kept.

Ours, not the paper's:

- The terms of the score are relative to their mean absolute values (`kfac.score`).
- The basis "whitened" decomposes W in the metric of the curvature. With L_G L_Gᵀ = G and L_A L_Aᵀ = A (both damped),
  and L_Gᵀ W L_A = U S Vᵀ: l_k = W L_A v_k = s_k L_G⁻ᵀ u_k, r_k = v_kᵀ L_A⁻¹, size s_k. The components are orthogonal
  under H: dropping a set of them costs ⟨δ, H δ⟩ = Σ s_k², so that the largest R are the best approximation of rank R.
  (l_k from W L_A v_k takes one inverse less, so that float32 suffices.) GFWSVD (Chekalina et al., 2025, arXiv
  2505.17974) truncates the SVD of L_Gᵀ W L_A, with Kronecker factors of the Fisher information, to compress language
  models; here the paper's score and its protected share still choose among the directions.
- "Top 5 %" is rounded up, and never more than R.
- `canonical` factors. Two factors tell more than their product: an order by score tells the scores, whitened factors
  tell A and G. So what leaves the house is the product's own SVD, its singular values shared evenly between the two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from siftune.base.numerics import in_float64
from siftune.offsite.maths.kfac import DAMPING, Curvature, LambdaUnit, score

Basis = Literal["svd", "whitened"]


@dataclass(frozen=True)
class Components:
    """A matrix as a sum of rank-one components, W = left · right."""

    left_OK: Tensor  # one column for each component
    right_KI: Tensor  # one row for each
    size_K: Tensor  # singular values, descending


def rank_of(keep: float, outputs: int, inputs: int) -> int:
    """The rank at which two factors have the fraction `keep` of a matrix's parameters; at least 1."""
    return max(1, math.floor(keep * outputs * inputs / (outputs + inputs) + 1e-9))


def components(weight_OI: Tensor, curvature: Curvature, basis: Basis, damping: float = DAMPING) -> Components:
    """Decompose a matrix.

    Args:
        weight_OI: W.
        curvature: A and G of W; of no use to the basis "svd".
        basis: Of W ("svd"), or of W in the metric of the curvature ("whitened").
        damping: Of A and G, relative to the mean of their diagonals.

    Returns:
        K = min(O, I) components, in the dtype of the curvature.
    """
    weight_OI = weight_OI.to(curvature.slope_OI.dtype)
    if basis == "svd":
        left_OK, size_K, right_KI = torch.linalg.svd(weight_OI, full_matrices=False)
        return Components(left_OK, size_K[:, None] * right_KI, size_K)
    root_II = curvature.inputs.root(damping)
    seen_OI = weight_OI @ root_II
    _, size_K, v_KI = torch.linalg.svd(curvature.gradients.root(damping).T @ seen_OI, full_matrices=False)
    right_KI = torch.linalg.solve_triangular(root_II, v_KI, upper=False, left=False)
    return Components(seen_OI @ v_KI.T, right_KI, size_K)


def component_scores(components: Components, curvature: Curvature, lam: float, unit: LambdaUnit = "relative") -> Tensor:
    """Score components; high ones should stay.

    Args:
        components: Of W.
        curvature: Of W.
        lam: λ, the weight of the loss gap.
        unit: Of λ.

    Returns:
        (K,) scores.
    """
    left_OK, right_KI = components.left_OK, components.right_KI
    left_norms_K = curvature.gradients.times(left_OK).abs().sum(0)
    right_norms_K = curvature.inputs.times(right_KI.T).abs().sum(0)
    slopes_K = torch.einsum("ok,oi,ki->k", left_OK, curvature.slope_OI, right_KI)
    return score(left_norms_K * right_norms_K, -slopes_K, lam, unit)


def keep_components(scores_K: Tensor, sizes_K: Tensor, rank: int, protect: float = 0.05) -> Tensor:
    """Choose the components that stay.

    Args:
        scores_K: (K,) scores.
        sizes_K: (K,) sizes.
        rank: Components to keep, from 1 to K.
        protect: Share of all components, the largest ones, that stay whatever their scores.

    Returns:
        (R,) int64 component numbers, ascending.
    """
    safe = min(rank, math.ceil(protect * len(sizes_K) - 1e-9))
    order_K = scores_K.clone()
    order_K[sizes_K.argsort(descending=True, stable=True)[:safe]] = torch.inf
    return order_K.argsort(descending=True, stable=True)[:rank].sort().values


def joint_costs(parts: Components, curvature: Curvature, choices: Sequence[Tensor]) -> list[float]:
    """The loss of keeping only some components: ⟨δ, H δ⟩ of all dropped ones together.

    ⟨δ, H δ⟩ = Σ_k,m (l_kᵀ G l_m)(r_k A r_mᵀ) over the dropped ones, so that a (K, K) matrix tells it of every choice.

    Args:
        parts: Components of W; the curvature in which they were chosen may be another.
        curvature: Of W; not damped.
        choices: For each the (R,) numbers of those that stay.

    Returns:
        A cost for every choice, summed in float64.
    """
    left_OK, right_IK = parts.left_OK, parts.right_KI.T
    both_KK = (left_OK.T @ curvature.gradients.times(left_OK)) * (right_IK.T @ curvature.inputs.times(right_IK))
    both_KK = in_float64(both_KK)
    costs = []
    for kept_R in choices:
        lost_K = both_KK.new_ones(len(both_KK))
        lost_K[kept_R.to(lost_K.device)] = 0
        costs.append(max(0.0, float(lost_K @ both_KK @ lost_K)))
    return costs


def factor(
    parts: Components,
    curvature: Curvature,
    rank: int,
    lam: float,
    protect: float = 0.05,
    unit: LambdaUnit = "relative",
) -> tuple[Tensor, Tensor]:
    """Replace a matrix by two thinner ones that leave the gradients of the other layers as they are, nearly.

    Args:
        parts: Components of W.
        curvature: Of W.
        rank: R, from 1 to min(O, I).
        lam: λ, the weight of the loss gap.
        protect: As for `keep_components`.
        unit: Of λ.

    Returns:
        (O, R) and (R, I) in float32, in canonical form.
    """
    kept_R = keep_components(component_scores(parts, curvature, lam, unit), parts.size_K, rank, protect)
    up_OR, down_RI = canonical(parts.left_OK[:, kept_R], parts.right_KI[kept_R])
    return up_OR.float(), down_RI.float()


def canonical(up_OR: Tensor, down_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Factors that depend on nothing but the product of the two given ones: U √S and √S Vᵀ, with up · down = U S Vᵀ.

    Directions are ordered by singular value, and the largest entry of each column of U is positive. (Equal singular
    values would leave the choice of a basis; those of real matrices are not.)

    Args:
        up_OR: (O, R).
        down_RI: (R, I), R ≤ min(O, I).

    Returns:
        Factors of the same shapes and product.
    """
    left_OR, upper_RR = torch.linalg.qr(up_OR)
    right_IR, lower_RR = torch.linalg.qr(down_RI.T)
    u_RR, size_R, v_RR = torch.linalg.svd(upper_RR @ lower_RR.T)
    u_OR, scale_R = left_OR @ u_RR, size_R.sqrt()
    largest_R = u_OR.gather(0, u_OR.abs().argmax(0, keepdim=True))[0]
    signed_R = torch.where(largest_R < 0, -scale_R, scale_R)
    return u_OR * signed_R, signed_R[:, None] * (v_RR @ right_IR.T)
