"""GAST's rule: every layer chooses the samples that it follows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from siftune.base.errors import RecipeError
from siftune.engine.groups import LayerGroup
from siftune.engine.tape import SampleGradients
from siftune.methods.drivers.sample_choice import Choosing, Unit, units_of
from siftune.methods.drivers.sample_driver import SampleRule, summed
from siftune.methods.drivers.support import Gradients, Support
from siftune.methods.gast import maths
from siftune.methods.gast.maths import Scored, live_samples, score_samples
from siftune.methods.gast.momentum import moved_mean
from siftune.methods.gast.settings import GASTSettings
from siftune.methods.gast.stream import Stream


class AlignedSamples(SampleRule):
    """Chooses samples by how their gradients align with the support's, for each layer by itself."""

    stream: Stream | None

    def __init__(self, settings: GASTSettings, groups: Sequence[LayerGroup]) -> None:
        super().__init__(units_of(groups), settings.select)
        self.settings = settings
        self.stream = Stream(settings, self.units) if settings.among == "recent" else None
        self.always = self.stream is not None and settings.select < 1
        averaged = (settings.support_size, settings.support_every, settings.support_decay)
        self.support = Support(*averaged) if settings.needs_rows else None
        self._groups = groups
        self._unit = {unit.layer: unit for unit in self.units}
        self._moves = settings.support == "momentum" and settings.needs_scores
        self._sums: Gradients = {}

    @property
    def keeps_mean(self) -> bool:
        """Whether a step's choice depends on gradients of earlier steps."""
        return self._moves or super().keeps_mean

    def follows_all(self, steps: int) -> bool:
        """Whether selection has ended after so many optimizer steps."""
        return self.planned is not None and steps >= round(self.settings.select_until * self.planned)

    def reduce(self, choosing: Choosing, layers: Sequence[tuple[LayerGroup, SampleGradients]]) -> Gradients:
        """Choose the samples that some layers follow, and add up their gradients."""
        reduced: Gradients = {}
        for group, grads in layers:
            unit = self._unit[group.index]
            own = {p: grads[p] for p in unit.parameters if p in grads}
            if own:
                reduced |= self._follow(choosing, unit, self._score(own), own)
        return reduced

    def end(self) -> None:
        """Move the running mean and the windows of recent rows, where there are any."""
        if self.support is not None:
            self.support.end()
        if self.stream is not None:
            self.stream.end()
        if self._moves:
            self._mean = moved_mean(self._mean, self._sums, self._groups, self.settings.decay)
            self._sums = {}

    def _follow(self, choosing: Choosing, unit: Unit, scored: Scored, grads: SampleGradients) -> Gradients:
        """Choose by scores, and add up the gradients of what was chosen."""
        uniform_S = choosing.uniform_on(scored.scores.device)[unit.place]
        if self.stream is not None:
            chosen, scale = self.stream.follow(unit, scored, uniform_S)
        else:
            chosen = maths.choose(scored.scores, scored.live, uniform_S, choosing.count, self.settings)
            scale = maths.factor(scored.live, chosen)
        choosing.note(unit, scored.scores if self.settings.needs_scores else None, chosen)
        scale = torch.where(torch.isfinite(scored.scores).all(), scale, torch.nan)
        return summed(grads, chosen, scale)

    def _score(self, grads: SampleGradients) -> Scored:
        """Score the samples of a batch by the gradients of one unit."""
        settings, parts = self.settings, list(grads.values())
        if not settings.needs_scores:
            live_S = live_samples(parts)
            return Scored(torch.zeros_like(live_S, dtype=torch.float32), live_S)
        compared = self._compared(grads)
        metric = None
        if settings.in_metric:
            assert self.optimizer is not None
            metric = [adam_metric(self.optimizer, p) for p in grads]
        scored = score_samples(parts, compared, metric, settings.is_cosine, totals=self._moves)
        if self._moves:
            self._add_to_sums(list(grads), scored.totals)
        return scored

    def _compared(self, grads: SampleGradients) -> list[Tensor] | None:
        """The support gradient of each parameter; None where it is that of the batch's other samples."""
        if self.settings.support == "rest":
            return None
        support = self.support.gradients if self.support is not None else self._mean
        return [support[p] if p in support else torch.zeros_like(part[0]) for p, part in grads.items()]

    def _add_to_sums(self, parameters: Sequence[nn.Parameter], totals: Sequence[Tensor]) -> None:
        for parameter, flat in zip(parameters, totals, strict=True):
            total = flat.view_as(parameter)
            self._sums[parameter] = self._sums[parameter] + total if parameter in self._sums else total


def adam_metric(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """Adam's metric: 1 / (√v̂ + ε), from its running mean v of squared gradients; ones before the first step.

    Its diagonal, in the parameter's shape; of Adam, AdamW, or an optimizer that keeps `exp_avg_sq` as they do.

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
