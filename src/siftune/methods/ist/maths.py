"""IST — Importance-aware Sparse Tuning.

Yao et al., "Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient
Fine-tuning of Large Language Models", Findings of EMNLP 2024, arXiv 2410.11772.

Each decoder layer ℓ has an importance logit I_ℓ, zero at the start; high = important (the published code
keeps the opposite sign). With p = σ(−I):

    sets      S_1 … S_K, distinct, ⌊suppressed·L⌋ layers each, without replacement, probability ∝ p
    reward    r_k = exp(−loss_k) − mean_k exp(−loss_k),  loss_k with the adapters of S_k damped by `factor`
    update    I_ℓ ← I_ℓ − lr · Σ_{k: ℓ ∈ S_k} r_k · p_ℓ (1 − p_ℓ)
    step      max(1, ⌊active·L⌋) layers train, without replacement, probability ∝ σ(I)

Symbols: L layers, K candidate sets, N layers in a set. I `logits_L`, S `sets_KN`, r `rewards_K`.

Ours, not the paper's: at least one layer is suppressed, however few there are. If fewer than K distinct sets exist, all
of them are drawn. A draw uses log-probabilities (Gumbel top-N), so that logits far from zero do not underflow.
"""

import math

import torch
from torch import Tensor

from siftune.base.numerics import draw_layers
from siftune.methods.options import count_of

_MAX_DRAWS = 1000  # rejections before fewer than K sets are accepted; reached only by logits far from zero


def draw_active(logits_L: Tensor, active: float, generator: torch.Generator) -> Tensor:
    """Draw the layers that train in this step, probability ∝ σ(I); (N,) int64, ascending."""
    layers = logits_L.numel()
    return draw_layers(torch.nn.functional.logsigmoid(logits_L), count_of(float(active), layers), generator)


def draw_candidates(logits_L: Tensor, candidates: int, suppressed: float, generator: torch.Generator) -> Tensor:
    """Draw the distinct layer sets to suppress, probability ∝ σ(−I).

    Args:
        logits_L: (L,) float64 importance.
        candidates: Sets to draw.
        suppressed: Share of the layers in each.
        generator: Source of randomness, on the CPU.

    Returns:
        (K, N) int64 positions of layers, each row ascending; K is below `candidates` if fewer distinct sets exist.
    """
    layers = logits_L.numel()
    size = count_of(float(suppressed), layers)
    count = min(candidates, math.comb(layers, size))
    log_weights_L = torch.nn.functional.logsigmoid(-logits_L)
    sets: dict[tuple[int, ...], None] = {}
    for _ in range(_MAX_DRAWS):
        sets.setdefault(tuple(draw_layers(log_weights_L, size, generator).tolist()))
        if len(sets) == count:
            break
    return torch.tensor(list(sets), dtype=torch.int64)


def rewards(losses_K: Tensor) -> Tensor:
    """Reward of each candidate set, exp(−loss) minus its mean; (K,) float64."""
    likelihood_K = torch.exp(-losses_K.to(torch.float64))
    return likelihood_K - likelihood_K.mean()


def update_importance(logits_L: Tensor, sets_KN: Tensor, rewards_K: Tensor, lr: float) -> Tensor:
    """Update the importance of the suppressed layers by the reward of their sets.

    If the likelihood stays high while a set is suppressed, its layers matter little.

    Args:
        logits_L: (L,) float64 importance before the update.
        sets_KN: (K, N) int64 suppressed layers.
        rewards_K: (K,) float64 rewards.
        lr: Step size of the update.

    Returns:
        (L,) float64 importance after the update; the input is not changed.
    """
    p_L = torch.sigmoid(-logits_L)
    total_L = torch.zeros_like(logits_L)
    for set_N, reward in zip(sets_KN, rewards_K, strict=True):
        total_L[set_N] += reward
    return logits_L - lr * total_L * p_L * (1 - p_L)
