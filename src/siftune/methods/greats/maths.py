"""GREATS — online selection of rows for the whole model.

Wang, Wu, Song, Mittal, Jia, "GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration",
NeurIPS 2024. With g_i the gradient of sample i's share of the loss for all adapter parameters, h that of the support
rows, η the learning rate, S the samples chosen so far, K of B to be chosen:

    gain       ⟨h, g_i⟩ − η (B/K) Σ_{j ∈ S} ⟨g_i, g_j⟩
    choice     K times the sample with the highest gain
    gradient   (B/K) · Σ_{i ∈ S} g_i

The gain is what a step of gradient descent on S and i is worth on the support rows beyond a step on S, to second order
with the identity for the Hessian, and without the term ⟨g_i, g_i⟩, as the authors' code has it.

Ours, not the paper's: the factor B/K, by which a step on K samples is as long as one on all; h is one gradient of rows
drawn in each step (`support="sample"`: from the training set), where the authors keep a validation set. As theirs, the
choice takes the learning rate as if the optimizer were SGD.

Symbols: B samples, K chosen, D values of a parameter. ⟨h, g_i⟩ `products_B`, ⟨g_i, g_j⟩ `gram_BB`.
"""

import torch
from torch import Tensor


def greedy(products_B: Tensor, gram_BB: Tensor, live_B: Tensor, count: int, step: float) -> Tensor:
    """Choose samples one after the other, each by its product with the support less its overlap with those before.

    Args:
        products_B: (B,) ⟨h, g_i⟩.
        gram_BB: (B, B) ⟨g_i, g_j⟩.
        live_B: (B,) bool, the samples that have a gradient; others are taken only where there are too few.
        count: K ≤ B.
        step: η (B/K), the length of the step that is taken on the sum of the g_i.

    Returns:
        (K,) int64 sample numbers in the order of choice.

    Example:
        >>> products = torch.tensor([3.0, 2.9, 1.0])
        >>> gram = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])  # sample 1 is like sample 0
        >>> greedy(products, gram, torch.ones(3, dtype=torch.bool), 2, step=2.5)
        tensor([0, 2])
    """
    gains_B = products_B.where(live_B, -torch.finfo(products_B.dtype).max)
    chosen: list[Tensor] = []
    for _ in range(count):
        best = gains_B.argmax()
        chosen.append(best)
        gains_B = (gains_B - step * gram_BB[best]).index_fill(0, torch.stack(chosen), -torch.inf)
    return torch.stack(chosen)
