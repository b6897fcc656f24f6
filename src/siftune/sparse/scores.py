"""Scores of samples against a support gradient, summed over the parameters of a unit.

The scores of GAST (`gast`), formed from the gradients of single samples. Without a support gradient, each sample's
support are the others: h_i = Σ_j g_j − g_i, so that ⟨h_i, g_i⟩ = ⟨Σ_j g_j, g_i⟩ − ⟨g_i, g_i⟩.

Shapes: S samples, D values of one parameter. Lists hold one tensor per parameter. In a metric, ⟨a, b⟩ is Σ m a b.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from siftune.capture import ghost
from siftune.sparse.gast import cosines


class Scored(NamedTuple):
    """Scores, and which samples have a gradient at all.

    Attributes:
        scores: (S,) float32, or float64 where the gradients are.
        live: (S,) bool.
    """

    scores: Tensor
    live: Tensor


def live_samples(grads: Sequence[Tensor]) -> Tensor:
    """Which samples have a gradient other than zero; (S,) bool."""
    return ghost.added([g.flatten(1).count_nonzero(1) for g in grads]) > 0


def score_samples(
    grads: Sequence[Tensor],
    support: Sequence[Tensor] | None,
    metric: Sequence[Tensor] | None = None,
    cosine: bool = False,
) -> Scored:
    """Score samples by the inner product of their gradients with the support's.

    A sample whose gradient is shorter than about 1e-22 counts as one without.

    Args:
        grads: (S, …) gradients of the samples, one tensor per parameter.
        support: Support gradient of each parameter; None: the other samples.
        metric: Weight of each value in the inner product, one tensor per parameter; None: 1.
        cosine: Divide by the lengths of both sides; not together with a metric.
    """
    squares_S = ghost.added([ghost.squares(g) for g in grads])
    if support is None and cosine:
        return Scored(_cosines_with_the_rest(grads), squares_S > 0)
    weighted = grads if metric is None else [ghost.widened(g) * m for g, m in zip(grads, metric, strict=True)]
    others = [ghost.total(g) for g in grads] if support is None else support
    products_S = ghost.added([ghost.products(w, h) for w, h in zip(weighted, others, strict=True)])
    if support is None:
        own_S = squares_S if metric is None else ghost.added([_dot(w, g) for w, g in zip(weighted, grads, strict=True)])
        products_S = products_S - own_S
    if cosine:
        other_square = ghost.added([ghost.squares(h[None]) for h in others])
        products_S = cosines(products_S, squares_S, other_square)
    return Scored(products_S, squares_S > 0)


def _cosines_with_the_rest(grads: Sequence[Tensor]) -> Tensor:
    """From all inner products between samples: no length is the difference of two much larger ones."""
    wide = [ghost.widened(g).flatten(1) for g in grads]
    gram_SS = torch.stack([g @ g.T for g in wide]).sum(0)
    squares_S = gram_SS.diagonal()
    rest_SS = 1 - torch.eye(len(gram_SS), dtype=gram_SS.dtype, device=gram_SS.device)
    return cosines((gram_SS * rest_SS).sum(1), squares_S, ((rest_SS @ gram_SS) * rest_SS).sum(1))


def _dot(left_SD: Tensor, right_SD: Tensor) -> Tensor:
    return (left_SD.flatten(1) * ghost.widened(right_SD).flatten(1)).sum(1)
