"""GAST — Gradient-aligned Sparse Tuning.

"Gradient-aligned Sparse Tuning of large language models with data-layer selection", EACL 2026, arXiv 2603.09865.

Every layer ℓ follows the samples whose gradients point where those of a small support set do. With g_{ℓ,i} the gradient
of sample i's share of the loss for the adapter parameters of layer ℓ, and h_ℓ the gradient of the support set:

    score      s_i = ⟨h, g_i⟩
    z-score    z_i = (s_i − mean_i s) / (std_i s + ε)
    draw       K of B samples with probability p = softmax(z)
    gradient   (B / K) · Σ_{i drawn} g_i

Without a support gradient, each sample's support are the others: h_i = Σ_j g_j − g_i, so that ⟨h_i, g_i⟩ =
⟨Σ_j g_j, g_i⟩ − ⟨g_i, g_i⟩. In a metric m, ⟨a, b⟩ is Σ m a b. Scores add up over the parameters of a layer.

With `among="recent"` rows compete not with their batch but with the N rows that came last, so that a batch may have one
row. A row's z-score is the one in the company of those N, and with M = N + 1 rows and the share p to be followed

    chance     π_i = min(1, c exp(z_i)), with c such that the mean of π over the M rows is p
    top        π_i = 1 for the highest pM of the M rows; rows of the same score share what places they take
    draw       row i, where π_1 + … + π_i + u passes a whole number, u uniform (Madow's systematic sampling)
    gradient   (1/p) · Σ_{i drawn} g_i

As the row itself is one of the M, the expected share is p for any N where rows of all steps are alike.

Symbols: B (or S) samples, K drawn, N rows that came last, M = N + 1, D values of one parameter; lists hold one tensor
per parameter. s `scores_B`, z `zscores_B`, π `chances_S`.

Ours, not the paper's: drawing without replacement (Gumbel top-K, which is the same as drawing one after the other);
the factor B/K; the scores "cosine", "preconditioned" (the inner product in Adam's metric, after OPUS, arXiv 2602.05400)
and "preconditioned-cosine"; support gradients averaged over steps
(`support_every`, `support_decay`); the support modes "rest" (h_i = Σ_{j≠i} g_j), "momentum" (a running mean of the
gradients of earlier steps) and "dataset"; steps at the end that follow every sample (`select_until`); std is that of
the population; ε is 1e-5 of the largest |s|, so that neither the size of the loss nor that of a loss scale matters and
rounding is not taken for a difference; samples without a gradient (no label) stand back: they are left out of mean, std
and B, and drawn only where there are fewer than K others; rows that compete with recent rows.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from siftune.base import numerics
from siftune.base.numerics import gumbel_top_k, widened
from siftune.methods.gast.settings import GASTSettings

_EPSILON = 1e-5  # of the largest score


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
        scores_B: (…, B) scores.
        live_B: (…, B) bool, the samples that have a gradient.
    """
    count = live_B.sum(-1, keepdim=True).clamp_min(1)
    kept_B = scores_B.where(live_B, 0.0)
    centred_B = (kept_B - kept_B.sum(-1, keepdim=True) / count).where(live_B, 0.0)
    std = (centred_B.square().sum(-1, keepdim=True) / count).sqrt()
    largest = kept_B.abs().amax(-1, keepdim=True)
    z_B: Tensor = centred_B / (std + _EPSILON * largest).clamp_min(torch.finfo(scores_B.dtype).tiny)
    return z_B


def log_probabilities(zscores_B: Tensor, live_B: Tensor) -> Tensor:
    """Log softmax(z) over the samples that have a gradient; the others stand far behind them."""
    behind = zscores_B.min() - 1e9
    return torch.log_softmax(zscores_B.where(live_B, behind), 0)


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
    return gumbel_top_k(log_probabilities(z_B, live_B), uniform_B, count)


def factor(live_B: Tensor, chosen_K: Tensor) -> Tensor:
    """What the sum over the chosen samples is multiplied by: B/K over samples that have a gradient."""
    return live_B.sum() / live_B[chosen_K].sum().clamp_min(1)


TURN = 2**40  # whole numbers stand for running sums, in 1/TURN: no rounding adds up, however batches are divided


def chances(scores_S: Tensor, recent_N: Tensor, settings: GASTSettings) -> Tensor:
    """Chance of each row to be followed, by its score in the company of recent rows.

    Args:
        scores_S: (S,) scores; where the choice is "random" they are not looked at, nor are the others.
        recent_N: (N,) scores of recent rows, finite.
        settings: The method's settings; `select` is a share.

    Returns:
        (S,) from 0 to 1; NaN where a score is not finite.
    """
    share = float(settings.select)
    if settings.choice == "random":
        return torch.full_like(scores_S, share)
    if settings.choice == "topk":
        above_S = (recent_N > scores_S[:, None]).sum(1, dtype=scores_S.dtype)
        equal_S = (recent_N == scores_S[:, None]).sum(1) + 1
        return ((share * (len(recent_N) + 1) - above_S) / equal_S).clamp(0, 1)
    company_SM = torch.cat([recent_N.expand(len(scores_S), -1), scores_S[:, None]], 1)
    logits_SM = zscores(company_SM, torch.ones_like(company_SM, dtype=torch.bool))
    return (log_factor(logits_SM, share) + logits_SM[:, -1]).clamp_max(0).exp()


def log_factor(logits_SM: Tensor, share: float) -> Tensor:
    """Log c, such that the mean of min(1, c exp(logit)) is a share.

    Where the k largest are at 1, the others have c = (share·M − k) / Σ exp(logit) among them. The k that is right is
    the first at which none of the others is above 1.

    Args:
        logits_SM: (S, M), each row for itself.
        share: The mean, above 0 and below 1.

    Returns:
        (S,).
    """
    size = logits_SM.shape[1]
    falling_SM = logits_SM.sort(1, descending=True).values
    log_sums_SM = falling_SM.flip(1).logcumsumexp(1).flip(1)  # over a row and those after it
    left_M = share * size - torch.arange(size, device=logits_SM.device, dtype=logits_SM.dtype)
    log_c_SM = left_M.clamp_min(0).log() - log_sums_SM
    first_S = (log_c_SM + falling_SM > 0).sum(1).clamp_max(math.ceil(share * size) - 1)
    return log_c_SM.gather(1, first_S[:, None]).squeeze(1)


def systematic(chances_S: Tensor, begun: Tensor) -> tuple[Tensor, Tensor]:
    """Draw rows as they come: those at which the running sum of chances passes a whole number.

    Of rows whose chances add up to x, ⌊x⌋ or ⌈x⌉ are drawn, and each with its chance where the sum began evenly
    (Madow, "On the theory of systematic sampling, II", Annals of Mathematical Statistics 20, 1949).

    Args:
        chances_S: (S,) from 0 to 1.
        begun: Scalar int64, the running sum's fraction before these rows, in 1/TURN.

    Returns:
        drawn: (S,) bool.
        fraction: As `begun`, after these rows.
    """
    steps_S = (chances_S * TURN).round().long()
    ends_S = begun + steps_S.cumsum(0)
    return ends_S // TURN > (ends_S - steps_S) // TURN, ends_S[-1] % TURN


class Scored(NamedTuple):
    """Scores, which samples have a gradient at all, and what the samples' gradients add up to."""

    scores: Tensor  # (S,) float32, or float64 where the gradients are
    live: Tensor  # (S,) bool
    # sum over the samples for each parameter, (D,); empty where it was neither needed nor asked for
    totals: Sequence[Tensor] = ()


def live_samples(grads: Sequence[Tensor]) -> Tensor:
    """Which samples have a gradient, as `score_samples` sees it; (S,) bool."""
    squares_S = torch.zeros(len(grads[0]), device=grads[0].device)
    for grad in sorted(grads, key=Tensor.numel):
        squares_S = squares_S + numerics.squares(widened(grad))
        if squares_S.device.type == "cpu" and bool(squares_S.all()):  # elsewhere asking costs more than it saves
            break
    return squares_S > 0


def score_samples(
    grads: Sequence[Tensor],
    support: Sequence[Tensor] | None,
    metric: Sequence[Tensor] | None = None,
    cosine: bool = False,
    totals: bool = False,
) -> Scored:
    """Score samples by the inner product of their gradients with the support's.

    A sample whose gradient is shorter than about 1e-22 counts as one without.

    Args:
        grads: (S, …) gradients of the samples, one tensor per parameter.
        support: Support gradient of each parameter; None: the other samples.
        metric: Weight of each value in the inner product, positive, one tensor per parameter; None: 1.
        cosine: Divide by the lengths of both sides, in the same metric.
        totals: Return the sums over the samples as well; not for cosines with the other samples.
    """
    if support is None and cosine:
        squares_S = numerics.added([numerics.squares(widened(g)) for g in grads])
        return Scored(_cosines_with_the_rest(grads, metric), squares_S > 0)
    none = [None] * len(grads)
    shares = [_against(*those, totals) for those in zip(grads, support or none, metric or none, strict=True)]
    products, squares, others, sums = zip(*shares, strict=True)
    products_S, squares_S = numerics.added(products), numerics.added(squares)
    scores_S = cosines(products_S, squares_S, numerics.added(others)) if cosine else products_S
    return Scored(scores_S, squares_S > 0, [total for total in sums if total is not None])


def _against(
    grad: Tensor, support: Tensor | None, metric: Tensor | None, total: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One parameter's share: products (S,), squares (S,) and the support's square in the metric, and the sum (D,).

    The gradients are widened once: on processors, sums over half precision take longer than the cast.
    """
    wide_SD = widened(grad).flatten(1)
    total_D = numerics.total(wide_SD) if total or support is None else None
    other_D = total_D if support is None else support.flatten()
    assert other_D is not None
    weighted_SD = wide_SD if metric is None else wide_SD * metric.flatten()
    squares_S = numerics.squares(wide_SD) if metric is None else (weighted_SD * wide_SD).sum(1)
    products_S = numerics.products(weighted_SD, other_D)
    if support is None:
        products_S = products_S - squares_S
    wide_D = widened(other_D)
    other = numerics.squares(wide_D[None]).squeeze(0) if metric is None else (metric.flatten() * wide_D.square()).sum()
    return products_S, squares_S, other, total_D


def _cosines_with_the_rest(grads: Sequence[Tensor], metric: Sequence[Tensor] | None) -> Tensor:
    """From all inner products between samples: no length is the difference of two much larger ones."""
    wide = [widened(g).flatten(1) for g in grads]
    other = wide if metric is None else [g * weight.flatten() for g, weight in zip(wide, metric, strict=True)]
    gram_SS = torch.stack([g @ w.T for g, w in zip(wide, other, strict=True)]).sum(0)
    squares_S = gram_SS.diagonal()
    rest_SS = 1 - torch.eye(len(gram_SS), dtype=gram_SS.dtype, device=gram_SS.device)
    return cosines((gram_SS * rest_SS).sum(1), squares_S, ((rest_SS @ gram_SS) * rest_SS).sum(1))
