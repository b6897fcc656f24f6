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

Ours, not the paper's: at least one layer is suppressed however few there are; where fewer than K distinct
sets exist, all of them are drawn; a draw works on log-probabilities (Gumbel top-N), so that logits far from
zero do not underflow.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from siftune.errors import RecipeError
from siftune.numerics import gumbel_top_k

_MAX_DRAWS = 1000  # rejections before fewer than K sets are accepted; reached only by logits far from zero


@dataclass(frozen=True)
class ISTSettings:
    """The settings of IST; defaults are the paper's.

    Attributes:
        active: Share of the layers that train in a step, in (0, 1].
        interval: Optimizer steps between two updates of the importance; None never updates it.
        score_batch_size: Training rows on which the candidate sets are compared.
        candidates: Candidate sets K per update.
        suppressed: Share of the layers in a candidate set, in (0, 1].
        factor: What the adapter response of a suppressed layer is multiplied by.
        score_lr: Learning rate of the importance logits.
        seed: Seed of the method's own generator.

    Raises:
        RecipeError: When a setting is out of its range.
    """

    active: float = 0.25
    interval: int | None = 10
    score_batch_size: int = 16
    candidates: int = 3
    suppressed: float = 0.5
    factor: float = 0.25
    score_lr: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("active", "suppressed"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise RecipeError(f"{name} is {value}; it is a share of the layers: give a number in (0, 1].")
        for name in ("interval", "score_batch_size", "candidates"):
            value = getattr(self, name)
            if value is not None and (value < 1 or value != int(value)):
                raise RecipeError(f"{name} is {value}; give a whole number of at least 1.")
        if not math.isfinite(self.factor) or not math.isfinite(self.score_lr):
            raise RecipeError("factor and score_lr must be finite numbers.")


def share(fraction: float, layers: int) -> int:
    """Number of layers in a share: max(1, ⌊fraction·layers⌋), immune to the rounding of the product."""
    return max(1, math.floor(fraction * layers + 1e-9))


def draw_layers(log_weights_L: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw layers one after the other, without replacement, with probability ∝ their weight.

    Args:
        log_weights_L: (L,) float64 logarithms of the weights.
        count: Layers to draw, 1 ≤ count ≤ L.
        generator: Source of randomness, on the CPU.

    Returns:
        (count,) int64 layer indices, ascending.
    """
    uniform_L = torch.rand(log_weights_L.shape, generator=generator, dtype=torch.float64)
    return gumbel_top_k(log_weights_L, uniform_L, count)


def draw_active(logits_L: Tensor, active: float, generator: torch.Generator) -> Tensor:
    """Draw the layers that train in this step, probability ∝ σ(I); (N,) int64, ascending."""
    layers = logits_L.numel()
    return draw_layers(torch.nn.functional.logsigmoid(logits_L), share(active, layers), generator)


def draw_candidates(logits_L: Tensor, settings: ISTSettings, generator: torch.Generator) -> Tensor:
    """Draw the distinct layer sets to suppress, probability ∝ σ(−I).

    Returns:
        (K, N) int64 layer indices, each row ascending; K is smaller than `settings.candidates` where fewer
        distinct sets exist.
    """
    layers = logits_L.numel()
    size = share(settings.suppressed, layers)
    wanted = min(settings.candidates, math.comb(layers, size))
    log_weights_L = torch.nn.functional.logsigmoid(-logits_L)
    found: dict[tuple[int, ...], None] = {}
    for _ in range(_MAX_DRAWS):
        found.setdefault(tuple(draw_layers(log_weights_L, size, generator).tolist()))
        if len(found) == wanted:
            break
    return torch.tensor(list(found), dtype=torch.int64)


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
