"""Scores of samples against a support gradient, summed over the parameters of a unit.

The scores of GAST (`gast`), formed from the gradients of single samples. Without a support gradient, each sample's
support are the others: h_i = Σ_j g_j − g_i, so that ⟨h_i, g_i⟩ = ⟨Σ_j g_j, g_i⟩ − ⟨g_i, g_i⟩.

Shapes: S samples, D values of one parameter. Lists hold one tensor per parameter. In a metric, ⟨a, b⟩ is Σ m a b.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from siftune.engine import per_sample
from siftune.methods.gast.maths import cosines
from siftune.numerics import widened


class Scored(NamedTuple):
    """Scores, which samples have a gradient at all, and what the samples' gradients add up to.

    Attributes:
        scores: (S,) float32, or float64 where the gradients are.
        live: (S,) bool.
        totals: Sum over the samples for each parameter, (D,); empty where it was neither needed nor asked for.
    """

    scores: Tensor
    live: Tensor
    totals: Sequence[Tensor] = ()


def live_samples(grads: Sequence[Tensor]) -> Tensor:
    """Which samples have a gradient, as `score_samples` sees it; (S,) bool."""
    squares_S = torch.zeros(len(grads[0]), device=grads[0].device)
    for grad in sorted(grads, key=Tensor.numel):
        squares_S = squares_S + per_sample.squares(widened(grad))
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
        metric: Weight of each value in the inner product, one tensor per parameter; None: 1.
        cosine: Divide by the lengths of both sides; not together with a metric.
        totals: Return the sums over the samples as well; not for cosines with the other samples.
    """
    if support is None and cosine:
        squares_S = per_sample.added([per_sample.squares(widened(g)) for g in grads])
        return Scored(_cosines_with_the_rest(grads), squares_S > 0)
    none = [None] * len(grads)
    shares = [_against(*those, totals) for those in zip(grads, support or none, metric or none, strict=True)]
    products, squares, others, sums = zip(*shares, strict=True)
    products_S, squares_S = per_sample.added(products), per_sample.added(squares)
    scores_S = cosines(products_S, squares_S, per_sample.added(others)) if cosine else products_S
    return Scored(scores_S, squares_S > 0, [total for total in sums if total is not None])


def _against(
    grad: Tensor, support: Tensor | None, metric: Tensor | None, total: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One parameter's share: products (S,), squares (S,), the support's square, and the sum over samples (D,).

    The gradients are widened once: on processors, sums over half precision take longer than the cast.
    """
    wide_SD = widened(grad).flatten(1)
    squares_S = per_sample.squares(wide_SD)
    total_D = per_sample.total(wide_SD) if total or support is None else None
    other_D = total_D if support is None else support
    assert other_D is not None
    weighted_SD = wide_SD if metric is None else wide_SD * metric.flatten()
    products_S = per_sample.products(weighted_SD, other_D)
    if support is None:
        products_S = products_S - (squares_S if metric is None else (weighted_SD * wide_SD).sum(1))
    return products_S, squares_S, per_sample.squares(other_D[None]).squeeze(0), total_D


def _cosines_with_the_rest(grads: Sequence[Tensor]) -> Tensor:
    """From all inner products between samples: no length is the difference of two much larger ones."""
    wide = [widened(g).flatten(1) for g in grads]
    gram_SS = torch.stack([g @ g.T for g in wide]).sum(0)
    squares_S = gram_SS.diagonal()
    rest_SS = 1 - torch.eye(len(gram_SS), dtype=gram_SS.dtype, device=gram_SS.device)
    return cosines((gram_SS * rest_SS).sum(1), squares_S, ((rest_SS @ gram_SS) * rest_SS).sum(1))
