"""Scores of samples against a support gradient, summed over the parameters of a unit.

The scores of GAST (`gast`), formed from the gradients of single samples. Without a support gradient, each sample's
support are the others: h_i = Σ_j g_j − g_i, so that ⟨h_i, g_i⟩ = ⟨Σ_j g_j, g_i⟩ − ⟨g_i, g_i⟩.

Shapes: S samples, D values of one parameter. Lists hold one tensor per parameter. In a metric, ⟨a, b⟩ is Σ m a b.
"""

from collections.abc import Sequence
from typing import NamedTuple

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

    Args:
        grads: (S, …) gradients of the samples, one tensor per parameter.
        support: Support gradient of each parameter; None: the other samples.
        metric: Weight of each value in the inner product, one tensor per parameter; None: 1.
        cosine: Divide by the lengths of both sides.
    """
    weighted = grads if metric is None else [g * m.to(g.dtype) for g, m in zip(grads, metric, strict=True)]
    squares_S = ghost.added([ghost.squares(g) for g in grads])
    others = [ghost.total(g) for g in grads] if support is None else support
    products_S = ghost.added([ghost.products(w, h) for w, h in zip(weighted, others, strict=True)])
    other_squares = ghost.added([h.flatten().square().sum() for h in others])
    if support is None:
        own_S = squares_S if metric is None else ghost.added([_dot(w, g) for w, g in zip(weighted, grads, strict=True)])
        other_squares = other_squares - 2 * products_S + squares_S
        products_S = products_S - own_S
    scores_S = cosines(products_S, squares_S, other_squares) if cosine else products_S
    return Scored(scores_S, squares_S > 0)


def _dot(left_SD: Tensor, right_SD: Tensor) -> Tensor:
    wide = ghost.total(left_SD[:1]).dtype
    return (left_SD.flatten(1).to(wide) * right_SD.flatten(1).to(wide)).sum(1)
