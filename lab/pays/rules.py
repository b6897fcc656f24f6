"""Experimental rules in the place of GAST's choice, for the comparison alone.

Weights on rows instead of a choice. With s_i the score of row i for a unit, B the rows that have a gradient, g_i their
gradients:

    relu    Σ w_i g_i with w_i ∝ max(0, s_i), Σ w_i = B

Where no row scores above zero, every row counts 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from siftune.base.errors import RecipeError
from siftune.base.numerics import widened
from siftune.engine.groups import LayerGroup
from siftune.engine.tape import SampleGradients
from siftune.methods.drivers.sample_choice import Choosing, Unit
from siftune.methods.drivers.support import Gradients
from siftune.methods.gast.callback import GAST, AlignedSamples
from siftune.methods.gast.maths import Scored

Weigh = Callable[[Tensor, Tensor], Tensor]  # scores, live rows -> weights, all (B,)


def relu(scores_B: Tensor, live_B: Tensor) -> Tensor:
    """Weights ∝ max(0, score) that add up to the number of live rows, or 1 for each where none is above 0; (B,)."""
    weights_B = scores_B.where(live_B, 0.0).clamp_min(0)
    even_B = live_B.to(weights_B.dtype)
    weights_B = torch.where(weights_B.sum() > 0, weights_B, even_B)
    return weights_B * (even_B.sum() / weights_B.sum().clamp_min(torch.finfo(weights_B.dtype).tiny))


RULES: dict[str, Weigh] = {"relu": relu}


class WeighedSamples(AlignedSamples):
    """Follows rows by weights in the place of a choice; scores are GAST's, with any of its settings.

    Args:
        settings: GAST's.
        groups: The layers.
        weigh: Makes weights of scores.
    """

    def __init__(self, settings: GAST, groups: Sequence[LayerGroup], weigh: Weigh) -> None:
        super().__init__(settings, groups)
        self._weigh = weigh

    def _follow(self, choosing: Choosing, unit: Unit, scored: Scored, grads: SampleGradients) -> Gradients:
        """Weigh the rows by their scores, and add up their gradients."""
        weights_B = self._weigh(scored.scores, scored.live)
        choosing.note(unit, scored.scores, weights_B.topk(choosing.count).indices.sort().values)
        return {parameter: _sum(weights_B.to(part.device), part) for parameter, part in grads.items()}


def _sum(weights_B: Tensor, grads_BD: Tensor) -> Tensor:
    wide_BD = widened(grads_BD).flatten(1)
    return (weights_B.to(wide_BD.dtype) @ wide_BD).view(grads_BD.shape[1:])


def use_rule(methods: Sequence[Any], name: str) -> None:
    """Have GAST follow rows by an experimental rule.

    Args:
        methods: Of which those that are GAST take it.
        name: One of the rules above.

    Raises:
        RecipeError: There is no such rule, or no GAST that has scores.
    """
    if name not in RULES:
        raise RecipeError(f"there is no rule {name!r}; use {', '.join(RULES)}")
    chosen = [method for method in methods if isinstance(method, GAST) and method.needs_scores]
    if not chosen:
        raise RecipeError(f"the rule {name} weighs rows by GAST's scores: take it with method gast, not choice random")
    for method in chosen:
        method.rule = lambda groups, method=method: WeighedSamples(method, groups, RULES[name])
