"""LoRA-drop: layers by the response of their adapters.

Zhou et al., "LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation", COLING 2025, arXiv 2402.07721.
After a few steps of training, with x the inputs of an adapted module on a few training rows:

    g_l = Σ_modules Σ_x ‖ΔW x‖²      I_l = g_l / Σ_k g_k
    kept: the layers of the highest I, until their sum reaches T

    g_l   `responses_L`
    I_l   `importance`
    T     `threshold`

Ours, not the paper's: a layer's modules are added up, and a layer is kept as a whole; the other layers keep what they
have learned so far and go on unchanged, where the paper lets them share one LoRA; the rows are drawn evenly.
"""

import torch
from torch import Tensor


def importance(responses_L: Tensor) -> Tensor:
    """Shares of the whole response; even ones where nothing responds. (L,) float64, which add up to 1."""
    wide_L = responses_L.double()
    whole = wide_L.sum()
    return wide_L / whole if whole > 0 else torch.full_like(wide_L, 1 / len(wide_L))


def by_threshold(importance_L: Tensor, threshold: float) -> Tensor:
    """The fewest layers, the most important first, that have a share of the importance; int64, ascending.

    Args:
        importance_L: (L,) shares that add up to 1.
        threshold: The share, above 0; 1 takes all layers.

    Example:
        >>> by_threshold(torch.tensor([0.1, 0.6, 0.05, 0.25]), 0.8)
        tensor([1, 3])
    """
    if threshold >= 1:
        return torch.arange(len(importance_L))
    order_L = importance_L.argsort(descending=True, stable=True)
    before_L = importance_L[order_L].cumsum(0) - importance_L[order_L]
    return order_L[before_L < threshold - 1e-12].sort().values  # sums of shares are rounded


def by_count(importance_L: Tensor, count: int) -> Tensor:
    """The `count` most important layers; (count,) int64, ascending."""
    return importance_L.argsort(descending=True, stable=True)[:count].sort().values
