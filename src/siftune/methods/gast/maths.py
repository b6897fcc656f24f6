"""GAST — Gradient-aligned Sparse Tuning.

"Gradient-aligned Sparse Tuning of large language models with data-layer selection", EACL 2026 (2026.eacl-long.206),
arXiv 2603.09865.

Every layer ℓ follows the samples whose gradients align with those of a small support set. With g_{ℓ,i} the gradient of
sample i's share of the loss for the adapter parameters of layer ℓ, and h_ℓ the gradient of the support set:

    score      s_i = ⟨h, g_i⟩
    z-score    z_i = (s_i − mean_i s) / (std_i s + ε)
    draw       K of B samples with probability p = softmax(z)
    gradient   (B / K) · Σ_{i drawn} g_i

Without a support gradient, each sample's support are the others: h_i = Σ_j g_j − g_i, so that ⟨h_i, g_i⟩ =
⟨Σ_j g_j, g_i⟩ − ⟨g_i, g_i⟩. Scores add up over the parameters of a layer.

Symbols: B (or S) samples, K drawn, D values of one parameter; lists hold one tensor per parameter. s `scores_B`,
z `zscores_B`.

Ours, not the paper's:
- drawing without replacement (Gumbel top-K, which equals drawing one by one); the factor B/K; the score "cosine";
- support gradients averaged over steps (`support_every`), and the support modes "rest" (h_i = Σ_{j≠i} g_j) and
  "dataset";
- with a target, steps at the end that follow every sample;
- std is that of the population. ε is 1e-5 of the largest |s|, so that the scale of the loss does not matter and
  rounding is not taken for a difference;
- samples without a gradient (no label) are left out of mean, std and B. They are drawn only if there are fewer than K
  others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from siftune.base import numerics
from siftune.base.numerics import gumbel_top_k, widened
from siftune.methods.options import GASTSettings

_EPSILON = 1e-5  # of the largest score


def cosines(products_B: Tensor, squares_B: Tensor, other_squares: Tensor) -> Tensor:
    """Inner products divided by the lengths of both sides; 0 if a side is zero.

    Args:
        products_B: (B,) inner products.
        squares_B: (B,) squared lengths of the samples' gradients.
        other_squares: Squared length of the support gradient, a scalar or (B,).
    """
    lengths_B = (squares_B.clamp_min(0).sqrt() * other_squares.clamp_min(0).sqrt()).expand_as(products_B)
    return torch.where(lengths_B == 0, 0.0, products_B / lengths_B)  # NaN stays NaN


def zscores(scores_B: Tensor, live_B: Tensor) -> Tensor:
    """Scores relative to their mean, in standard deviations; all 0 if they are equal.

    Args:
        scores_B: (…, B) scores.
        live_B: (…, B) bool, samples with a gradient.
    """
    count = live_B.sum(-1, keepdim=True, dtype=scores_B.dtype).clamp_min(1)
    valid_B = scores_B.where(live_B, 0.0)
    centred_B = (valid_B - valid_B.sum(-1, keepdim=True) / count) * live_B
    std = torch.linalg.vector_norm(centred_B, dim=-1, keepdim=True) / count.sqrt()
    largest = torch.linalg.vector_norm(valid_B, torch.inf, -1, keepdim=True)
    z_B: Tensor = centred_B / torch.add(std, largest, alpha=_EPSILON).clamp_min(torch.finfo(scores_B.dtype).tiny)
    return z_B


def log_probabilities(zscores_B: Tensor, live_B: Tensor) -> Tensor:
    """Log softmax(z) over the samples that have a gradient; the others get a tiny probability."""
    behind = zscores_B.min() - 1e9
    return torch.log_softmax(zscores_B.where(live_B, behind), 0)


def choose(scores_B: Tensor, live_B: Tensor, uniform_B: Tensor, count: int, settings: GASTSettings) -> Tensor:
    """Choose the samples that a unit follows.

    Args:
        scores_B: (B,) scores; unused if the choice is "random".
        live_B: (B,) bool, samples with a gradient.
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
    return gumbel_top_k(log_probabilities(z_B, live_B), uniform_B, count)


def factor(live_B: Tensor, chosen_K: Tensor) -> Tensor:
    """Factor for the sum over the chosen samples: B/K, counting samples with a gradient."""
    return live_B.sum() / live_B[chosen_K].sum().clamp_min(1)


class Scored(NamedTuple):
    """Scores, and the samples that have a gradient."""

    scores: Tensor  # (S,) float32, or float64 if the gradients are
    live: Tensor  # (S,) bool


def live_samples(grads: Sequence[Tensor]) -> Tensor:
    """Samples with a gradient, as `score_samples` returns them; (S,) bool."""
    if grads[0].device.type != "cpu":
        return numerics.squares(numerics.joined(grads)) > 0
    squares_S = torch.zeros(len(grads[0]))
    for grad in sorted(grads, key=Tensor.numel):
        squares_S = squares_S + numerics.squares(widened(grad))
        if bool(squares_S.all()):  # elsewhere the test costs more than it saves
            break
    return squares_S > 0


def score_samples(grads: Sequence[Tensor], support: Sequence[Tensor] | None, cosine: bool = False) -> Scored:
    """Score samples by the inner product of their gradients with the support's.

    A sample with a gradient shorter than about 1e-22 counts as one without.

    Args:
        grads: (S, …) gradients of the samples, one tensor per parameter.
        support: Support gradient of each parameter; None: the other samples.
        cosine: Divide by the lengths of both sides.
    """
    if support is None and cosine:
        return _cosines_with_the_rest(widened(numerics.joined(grads)))
    # widened once: on CPUs, sums over half precision take longer than the cast
    wide_SD = widened(numerics.joined(grads))
    other_D = wide_SD.sum(0) if support is None else widened(numerics.joined([part[None] for part in support])[0])
    other_D = other_D.to(wide_SD)
    squares_S, products_S = numerics.squares(wide_SD), wide_SD @ other_D
    if support is None:
        products_S = products_S - squares_S
    scores_S = cosines(products_S, squares_S, numerics.squares(other_D[None])[0]) if cosine else products_S
    return Scored(scores_S, squares_S > 0)


def _cosines_with_the_rest(wide_SD: Tensor) -> Scored:
    """From all inner products between samples: no length is the difference of two much larger ones."""
    gram_SS = wide_SD @ wide_SD.T
    squares_S = gram_SS.diagonal()
    rest_SS = 1 - torch.eye(len(gram_SS), dtype=gram_SS.dtype, device=gram_SS.device)
    scores_S = cosines((gram_SS * rest_SS).sum(1), squares_S, ((rest_SS @ gram_SS) * rest_SS).sum(1))
    return Scored(scores_S, numerics.squares(wide_SD) > 0)
