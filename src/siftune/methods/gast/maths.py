"""GAST — Gradient-aligned Sparse Tuning.

"Gradient-aligned Sparse Tuning of large language models with data-layer selection", EACL 2026, arXiv 2603.09865.

Every layer ℓ follows the samples whose gradients point where those of a small support set do. With g_{ℓ,i} the gradient
of sample i's share of the loss for the adapter parameters of layer ℓ, and h_ℓ the gradient of the support set:

    score      s_i = ⟨h, g_i⟩
    z-score    z_i = (s_i − mean_i s) / (std_i s + ε)
    draw       K of B samples with probability p = softmax(z / τ)
    gradient   (B / K) · Σ_{i drawn} g_i

Symbols: B samples, K drawn, U units (layers, or modules), P values in a unit. s `scores_B`, z `zscores_B`.

Ours, not the paper's: drawing without replacement is the default (Gumbel top-K, which is the same as drawing one after
the other); `scale="sum"` drops the factor; pools of modules instead of layers; the scores "cosine" and
"preconditioned" (the inner product in Adam's metric, after OPUS, arXiv 2602.05400); the support modes "rest"
(h_i = Σ_{j≠i} g_j), "momentum" (a running mean of the gradients of earlier steps) and "dataset"; the temperature τ;
steps at the start that follow every sample (`select_after`); std is that of the population; ε is 1e-5 of the largest
|s|, so that neither the size of the loss nor that of a loss scale matters and rounding is not taken for a difference;
samples without a gradient (no label) stand back: they are left out of mean, std and B, and drawn only where there are
fewer than K others.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from siftune.errors import RecipeError
from siftune.numerics import gumbel_top_k

Support = Literal["sample", "rest", "momentum", "dataset"]
Choice = Literal["stochastic", "topk", "random"]
Score = Literal["inner", "cosine", "preconditioned"]
Pool = Literal["layer", "module"]
Scale = Literal["mean", "sum"]

_EPSILON = 1e-5  # of the largest score


@dataclass(frozen=True)
class GASTSettings:
    """The settings of GAST.

    Attributes:
        select: Samples K that a layer follows in a batch: a count (int), or a share of the batch (float; the
            paper's is 0.5).
        support: Where the support gradient comes from: rows of the training set ("sample"), the other samples of the
            batch ("rest"), the running mean of earlier gradients ("momentum"), rows of a set of its own ("dataset").
        support_size: Rows in the support set of "sample" and "dataset".
        choice: Draw by the score ("stochastic"), take the highest ("topk"), or draw uniformly ("random").
        score: Inner product, its cosine, or the inner product in the optimizer's metric ("preconditioned").
        pool: One choice per "layer", or one per adapted "module".
        scale: Factor B/K on the sum ("mean"), or none ("sum").
        replacement: Draw samples with replacement.
        temperature: τ; high draws more evenly.
        decay: Of the running mean of "momentum", per optimizer step.
        select_after: Optimizer steps at the start in which every sample is followed.
        seed: Seed of the method's own generator.

    Raises:
        RecipeError: When a setting is out of its range.
    """

    select: int | float = 0.75
    support: Support = "sample"
    support_size: int = 4
    choice: Choice = "stochastic"
    score: Score = "inner"
    pool: Pool = "layer"
    scale: Scale = "mean"
    replacement: bool = False
    temperature: float = 1.0
    decay: float = 0.9
    select_after: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        known = {"support": Support, "choice": Choice, "score": Score, "pool": Pool, "scale": Scale}
        for name, kinds in known.items():
            if getattr(self, name) not in get_args(kinds):
                raise RecipeError(f"{name} is {getattr(self, name)!r}; give one of {', '.join(get_args(kinds))}.")
        if not _is_count(self.select) and not (isinstance(self.select, float) and 0 < self.select <= 1):
            raise RecipeError(
                f"select is {self.select!r}; give a count of samples (a whole number, 1 or more), or a share of the "
                "batch (a number with a point, above 0 and at most 1)."
            )
        if not _is_count(self.support_size):
            raise RecipeError(f"support_size is {self.support_size}; give a whole number of at least 1.")
        if not 1e-6 <= self.temperature < math.inf:
            raise RecipeError(f"temperature is {self.temperature}; give a number from 1e-6; topk is the limit of 0.")
        if not 0 <= self.decay < 1:
            raise RecipeError(f"decay is {self.decay}; give a number from 0 to below 1.")
        if self.select_after != 0 and not _is_count(self.select_after):
            raise RecipeError(f"select_after is {self.select_after}; give a whole number of steps, 0 or more.")
        if self.replacement and self.choice == "topk":
            raise RecipeError('replacement goes with choice="stochastic" or "random": "topk" draws nothing.')

    @property
    def needs_scores(self) -> bool:
        """Whether the choice depends on the samples."""
        return self.choice != "random"

    @property
    def needs_rows(self) -> bool:
        """Whether the support gradient takes rows of its own."""
        return self.needs_scores and self.support in ("sample", "dataset")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def how_many(select: int | float, samples: int) -> int:
    """K for a batch: the count, or max(1, ⌊share·B⌋); never more than B."""
    wanted = select if isinstance(select, int) else max(1, math.floor(select * samples + 1e-9))
    return min(wanted, samples)


def cosines(products_B: Tensor, squares_B: Tensor, other_squares: Tensor) -> Tensor:
    """Inner products over the lengths of both sides; 0 where a side is zero.

    Args:
        products_B: (B,) inner products.
        squares_B: (B,) squared lengths of the samples' gradients.
        other_squares: Squared length of the support gradient, a scalar or (B,).
    """
    lengths_B = (squares_B.clamp_min(0).sqrt() * other_squares.clamp_min(0).sqrt()).expand_as(products_B)
    return torch.where(lengths_B == 0, 0.0, products_B / lengths_B)  # NaN stays NaN


def zscores(scores_B: Tensor, live_B: Tensor) -> Tensor:
    """Scores relative to their mean, in standard deviations; 0 for all where they are equal.

    Args:
        scores_B: (B,) scores.
        live_B: (B,) bool, the samples that have a gradient.
    """
    count = live_B.sum().clamp_min(1)
    kept_B = scores_B.where(live_B, 0.0)
    centred_B = (kept_B - kept_B.sum() / count).where(live_B, 0.0)
    std = (centred_B.square().sum() / count).sqrt()
    z_B: Tensor = centred_B / (std + _EPSILON * kept_B.abs().max()).clamp_min(torch.finfo(scores_B.dtype).tiny)
    return z_B


def log_probabilities(zscores_B: Tensor, live_B: Tensor, temperature: float) -> Tensor:
    """Log softmax(z/τ) over the samples that have a gradient; the others stand far behind them."""
    logits_B = zscores_B / temperature
    behind = logits_B.min() - 1e9
    return torch.log_softmax(logits_B.where(live_B, behind), 0)


def draw(log_p_B: Tensor, uniform_B: Tensor, count: int, replacement: bool) -> Tensor:
    """Draw samples.

    Args:
        log_p_B: (B,) logarithms of the probabilities.
        uniform_B: (B,) uniform numbers in [0, 1), the only source of chance; B ≥ count.
        count: Samples to draw.
        replacement: Draw each time from all.

    Returns:
        (count,) int64 sample numbers, ascending.
    """
    if replacement:
        ends_B = log_p_B.exp().cumsum(0)
        drawn_K = torch.searchsorted(ends_B, uniform_B[:count] * ends_B[-1], right=True)
        return drawn_K.clamp_max(log_p_B.numel() - 1).sort().values
    return gumbel_top_k(log_p_B, uniform_B, count)


def choose(scores_B: Tensor, live_B: Tensor, uniform_B: Tensor, count: int, settings: GASTSettings) -> Tensor:
    """Choose the samples that a unit follows.

    Args:
        scores_B: (B,) scores; not looked at where the choice is "random".
        live_B: (B,) bool, the samples that have a gradient.
        uniform_B: (B,) float64 uniform numbers.
        count: K, 1 ≤ K ≤ B.
        settings: The method's settings.

    Returns:
        (K,) int64 sample numbers, ascending.
    """
    if settings.choice == "topk":
        return scores_B.where(live_B, -torch.inf).topk(count).indices.sort().values
    even = settings.choice == "random"
    z_B = torch.zeros_like(uniform_B) if even else zscores(scores_B.to(uniform_B.dtype), live_B)
    return draw(log_probabilities(z_B, live_B, settings.temperature), uniform_B, count, settings.replacement)


def factor(live_B: Tensor, chosen_K: Tensor, scale: Scale) -> Tensor:
    """What the sum over the chosen samples is multiplied by: B/K over samples that have a gradient, or 1."""
    if scale == "sum":
        return torch.ones((), dtype=torch.float32, device=live_B.device)
    return live_B.sum() / live_B[chosen_K].sum().clamp_min(1)
