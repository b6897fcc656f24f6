"""GAST's rule: every layer, or adapted module, chooses the samples that it follows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from siftune import numerics
from siftune.engine.groups import LayerGroup
from siftune.engine.tape import SampleGradients
from siftune.errors import RecipeError
from siftune.methods.gast import maths
from siftune.methods.gast.maths import Scored, live_samples, score_samples
from siftune.methods.gast.momentum import moved_mean
from siftune.methods.gast.settings import GASTSettings
from siftune.methods.sample_choice import Choosing, Unit, units_of
from siftune.methods.sample_driver import Gradients


class AlignedSamples:
    """Chooses samples by how their gradients align with the support's, for each unit by itself.

    Args:
        settings: GAST's.
        groups: The layers.
    """

    whole = False

    def __init__(self, settings: GASTSettings, groups: Sequence[LayerGroup]) -> None:
        self.settings = settings
        self.units: Sequence[Unit] = units_of(groups, by_module=settings.pool == "module")
        self.select = settings.select
        self.always = settings.replacement
        self.support_size = settings.support_size if settings.needs_rows else 0
        self.keeps_mean = settings.support == "momentum" and settings.needs_scores
        self.mean: Gradients = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self._groups = groups
        self._sums: Gradients = {}

    def follows_all(self, steps: int) -> bool:
        """Whether selection has not begun after so many optimizer steps."""
        return steps < self.settings.select_after

    def reduce(
        self, choosing: Choosing, layers: Sequence[tuple[LayerGroup, SampleGradients]], support: Gradients
    ) -> Gradients:
        """Choose the samples that each unit of some layers follows, and add up their gradients."""
        reduced: Gradients = {}
        for group, grads in layers:
            for unit in self.units:
                parameters = [p for p in unit.parameters if p in grads] if unit.layer == group.index else []
                if parameters:
                    reduced |= self._reduce_unit(choosing, unit, {p: grads[p] for p in parameters}, support)
        return reduced

    def end(self) -> None:
        """Move the running mean, where there is one."""
        if self.keeps_mean:
            self.mean = moved_mean(self.mean, self._sums, self._groups, self.settings.decay)
            self._sums = {}

    def _reduce_unit(
        self, choosing: Choosing, unit: Unit, grads: SampleGradients, support: Gradients
    ) -> dict[nn.Parameter, Tensor]:
        scored = self._score(grads, support)
        uniform_S = choosing.uniform_on(scored.scores.device)[unit.place]
        chosen_K = maths.choose(scored.scores, scored.live, uniform_S, choosing.count, self.settings)
        choosing.note(unit, scored.scores if self.settings.needs_scores else None, chosen_K)
        scale = maths.factor(scored.live, chosen_K, self.settings.scale)
        scale = torch.where(torch.isfinite(scored.scores).all(), scale, torch.nan)
        return {parameter: numerics.sum_of(part, chosen_K) * scale for parameter, part in grads.items()}

    def _score(self, grads: SampleGradients, support: Gradients) -> Scored:
        """Score the samples of a batch for one unit."""
        settings, parts = self.settings, list(grads.values())
        if not settings.needs_scores:
            live_S = live_samples(parts)
            return Scored(torch.zeros_like(live_S, dtype=torch.float32), live_S)
        compared = self._compared(grads, self.mean if self.keeps_mean else support)
        metric = None
        if settings.score == "preconditioned":
            assert self.optimizer is not None
            metric = [adam_metric(self.optimizer, p) for p in grads]
        scored = score_samples(parts, compared, metric, settings.score == "cosine", totals=self.keeps_mean)
        if self.keeps_mean:
            self._add_to_sums(list(grads), scored.totals)
        return scored

    def _compared(self, grads: SampleGradients, support: Gradients) -> list[Tensor] | None:
        """The support gradient of each parameter; None where it is that of the batch's other samples."""
        if self.settings.support == "rest":
            return None
        return [support[p] if p in support else torch.zeros_like(part[0]) for p, part in grads.items()]

    def _add_to_sums(self, parameters: Sequence[nn.Parameter], totals: Sequence[Tensor]) -> None:
        for parameter, flat in zip(parameters, totals, strict=True):
            total = flat.view_as(parameter)
            self._sums[parameter] = self._sums[parameter] + total if parameter in self._sums else total


def adam_metric(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """Adam's metric: 1 / (√v̂ + ε), from its running mean v of squared gradients; ones before the first step.

    Args:
        optimizer: Adam, AdamW, or one that keeps `exp_avg_sq` as they do.
        parameter: One of its parameters.

    Returns:
        The metric's diagonal, in the parameter's shape.

    Raises:
        RecipeError: The optimizer keeps no such mean.
    """
    state = optimizer.state.get(parameter, {})
    if not state:
        return torch.ones_like(parameter)
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    if "exp_avg_sq" not in state or "betas" not in group:
        raise RecipeError(
            f'score="preconditioned" takes the metric of Adam or AdamW, but {type(optimizer).__name__} keeps no '
            'exp_avg_sq; use torch\'s AdamW (transformers: optim="adamw_torch"), or score="inner"'
        )
    correction = 1 - group["betas"][1] ** float(state["step"])
    metric: Tensor = 1 / ((state["exp_avg_sq"] / correction).sqrt() + group["eps"])
    return metric
