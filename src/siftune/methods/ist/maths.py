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

Ours, importance from gradients (`importance_from="gradients"`), after MISA (Liu et al., "Memory-Efficient LLMs
Optimization with Module-wise Importance Sampling", NeurIPS 2025, arXiv 2511.00056), which draws modules by running
means of their gradients' norms. There are no sets and no passes; before every optimizer step, for the layers S that
train in it and have a gradient, n_ℓ its norm:

    level     c = mean_{ℓ∈S} (log n_ℓ − I_ℓ)
    update    I_ℓ ← I_ℓ + (1 − β)·(log n_ℓ − c − I_ℓ),  ℓ ∈ S,  β = 0.9

a running mean of the layer's log-norm above the step's level. What multiplies all gradients of a step cancels:
clipping, GradScaler's factor, a hard batch, the fall of gradients in the course of training. And since the level takes
off what the layers of S are known to have, it does not matter which others happened to train. ΣI stays 0. A layer of
twice the typical norm tends to I = log 2, and σ(I) = 2/3.

Ours, not the paper's: at least one layer is suppressed however few there are; where fewer than K distinct
sets exist, all of them are drawn; a draw works on log-probabilities (Gumbel top-N), so that logits far from
zero do not underflow.
"""

import math

import torch
from torch import Tensor

from siftune.methods.drivers.layer_draws import draw_layers, share

_MAX_DRAWS = 1000  # rejections before fewer than K sets are accepted; reached only by logits far from zero

_NORM_DECAY = 0.9  # β, share of the running mean that stays at a visit


def draw_active(logits_L: Tensor, active: float, generator: torch.Generator) -> Tensor:
    """Draw the layers that train in this step, probability ∝ σ(I); (N,) int64, ascending."""
    layers = logits_L.numel()
    return draw_layers(torch.nn.functional.logsigmoid(logits_L), share(active, layers), generator)


def draw_candidates(logits_L: Tensor, candidates: int, suppressed: float, generator: torch.Generator) -> Tensor:
    """Draw the distinct layer sets to suppress, probability ∝ σ(−I).

    Args:
        logits_L: (L,) float64 importance.
        candidates: Sets to draw.
        suppressed: Share of the layers in each.
        generator: Source of randomness, on the CPU.

    Returns:
        (K, N) int64 positions of layers, each row ascending; K is smaller than `candidates` where fewer distinct sets
        exist.
    """
    layers = logits_L.numel()
    size = share(suppressed, layers)
    count = min(candidates, math.comb(layers, size))
    log_weights_L = torch.nn.functional.logsigmoid(-logits_L)
    sets: dict[tuple[int, ...], None] = {}
    for _ in range(_MAX_DRAWS):
        sets.setdefault(tuple(draw_layers(log_weights_L, size, generator).tolist()))
        if len(sets) == count:
            break
    return torch.tensor(list(sets), dtype=torch.int64)


def rewards(losses_K: Tensor) -> Tensor:
    """Reward of each candidate set, exp(−loss) above its mean; (K,) float64."""
    likelihood_K = torch.exp(-losses_K.to(torch.float64))
    return likelihood_K - likelihood_K.mean()


def update_importance(logits_L: Tensor, sets_KN: Tensor, rewards_K: Tensor, lr: float) -> Tensor:
    """Move the importance of the suppressed layers against the reward of their sets.

    A set whose suppression left the likelihood high holds layers that matter little.

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


def follow_norms(logits_L: Tensor, positions_N: Tensor, norms_N: Tensor) -> Tensor:
    """Move the importance of the layers that train by the norms of their gradients.

    Args:
        logits_L: (L,) float64 importance before the update.
        positions_N: (N,) int64 layers that train, each once.
        norms_N: (N,) float64 norms of their gradients, up to a common factor; layers without a gradient have 0 and are
            left out. Where one is not finite, the importance stays as it was: such a step is skipped, or training ends.

    Returns:
        (L,) float64 importance after the update; the input is not changed.
    """
    if not bool(torch.isfinite(norms_N).all()):
        return logits_L
    there = norms_N > 0
    layers_S, logs_S = positions_N[there], norms_N[there].log()
    above_S = logs_S - logits_L[layers_S]
    moved_L = logits_L.clone()
    if len(layers_S) > 0:
        moved_L[layers_S] += (1 - _NORM_DECAY) * (above_S - above_S.mean())
    return moved_L
