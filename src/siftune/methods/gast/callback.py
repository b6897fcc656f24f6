"""GAST for any transformers Trainer and for custom training loops; the equations are in `maths`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from siftune.base.numerics import all_finite
from siftune.base.settings import documented
from siftune.engine.gate import is_active
from siftune.engine.groups import LayerGroup
from siftune.engine.ranks import sum_over_ranks
from siftune.engine.tape import SampleGradients
from siftune.methods.drivers.sample_callback import SampleCallback, takes_target
from siftune.methods.drivers.sample_choice import Choosing, Unit, units_of
from siftune.methods.drivers.sample_driver import SampleRule, summed
from siftune.methods.drivers.support import Gradients, Support
from siftune.methods.gast import maths
from siftune.methods.gast.maths import Scored, live_samples, score_samples
from siftune.methods.options import GASTSettings

MOMENTUM_DECAY = 0.9
"""Share of the running mean of support "momentum" that remains after a step (ours)."""


class AlignedSamples(SampleRule):
    """Chooses samples by the alignment of their gradients with the support's, separately for each layer."""

    def __init__(self, settings: GASTSettings, groups: Sequence[LayerGroup]) -> None:
        super().__init__(units_of(groups), settings.select)
        self.settings = settings
        self.support = Support(settings.support_size, settings.support_every) if settings.needs_rows else None
        self._groups = groups
        self._unit = {unit.layer: unit for unit in self.units}
        self._moves = settings.support == "momentum" and settings.needs_scores
        self._sums: Gradients = {}

    @property
    def keeps_mean(self) -> bool:
        """Whether a step's choice depends on gradients of earlier steps."""
        return self._moves or super().keeps_mean

    def reduce(self, choosing: Choosing, layers: Sequence[tuple[LayerGroup, SampleGradients]]) -> Gradients:
        """Choose the samples for some layers, and add up their gradients."""
        reduced: Gradients = {}
        for group, grads in layers:
            unit = self._unit[group.index]
            own = {p: grads[p] for p in unit.parameters if p in grads}
            if own:
                reduced |= self._follow(choosing, unit, self._score(own), own)
        return reduced

    def end(self) -> None:
        """Move the running mean, if there is one."""
        if self.support is not None:
            self.support.end()
        if self._moves:
            self._mean = moved_mean(self._mean, self._sums, self._groups, MOMENTUM_DECAY)
            self._sums = {}

    def _follow(self, choosing: Choosing, unit: Unit, scored: Scored, grads: SampleGradients) -> Gradients:
        """Choose by scores, and add up the gradients of the chosen samples."""
        uniform_S = choosing.uniform_on(scored.scores.device)[unit.place]
        chosen_K = maths.choose(scored.scores, scored.live, uniform_S, choosing.count, self.settings)
        choosing.note(unit, scored.scores if self.settings.needs_scores else None, chosen_K)
        scale = maths.factor(scored.live, chosen_K)
        scale = torch.where(torch.isfinite(scored.scores).all(), scale, torch.nan)
        return summed(grads, chosen_K, scale)

    def _score(self, grads: SampleGradients) -> Scored:
        """Score the samples of a batch by the gradients of one unit."""
        settings, parts = self.settings, list(grads.values())
        if not settings.needs_scores:
            live_S = live_samples(parts)
            return Scored(torch.zeros_like(live_S, dtype=torch.float32), live_S)
        others: list[Tensor] | None = None  # the batch's other samples
        if settings.support != "rest":
            support = self.support.gradients if self.support is not None else self._mean
            others = [support[p] if p in support else torch.zeros_like(part[0]) for p, part in grads.items()]
        scored = score_samples(parts, others, settings.score == "cosine", totals=self._moves)
        if self._moves:
            for parameter, flat in zip(grads, scored.totals, strict=True):
                total = flat.view_as(parameter)
                self._sums[parameter] = self._sums[parameter] + total if parameter in self._sums else total
        return scored


def moved_mean(
    mean: Mapping[nn.Parameter, Tensor], sums: Gradients, groups: Sequence[LayerGroup], decay: float
) -> Gradients:
    """Running mean of the steps' gradients for support "momentum" (ours), after one more step on all ranks.

    All ranks exchange tensors of the same shapes. A rank on which a layer recorded nothing brings zeros, for example if
    its batch had no more samples than `select`. A last number reports whether any rank recorded. If none did, no
    sample's gradient was formed, and the mean stays. Layers that did not train keep their mean: no gradient was formed
    for them, which is not a gradient of zero. A mean never loses a NaN, so a step with one is left out.

    Args:
        mean: float32 by parameter; zero for a parameter that is not in it.
        sums: float32, this rank's sum over the samples of the step that count.
        groups: The layers.
        decay: Share of the mean that remains.
    """
    parameters = [p for group in groups if is_active(group) for p in group.parameters.values()]
    totals = [sums[p] if p in sums else torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    recorded = totals[0].new_full((1,), float(bool(sums)))
    *totals, recorded = sum_over_ranks([*totals, recorded])
    if not bool(recorded) or not all_finite(totals):
        return dict(mean)
    moved = {
        parameter: (mean[parameter] if parameter in mean else torch.zeros_like(total)).lerp(total, 1 - decay)
        for parameter, total in zip(parameters, totals, strict=True)
    }
    return {**mean, **moved}


@documented
@takes_target
@dataclass(eq=False)
class GAST(SampleCallback, GASTSettings):
    """Gradient-aligned Sparse Tuning: every layer follows the samples that align with a support set (arXiv 2603.09865).

    Scores and choices are per forward pass: with gradient accumulation per micro-batch, with several ranks per rank's
    part of the batch. Parameters outside of the decoder layers follow all samples. A sample is a row; in paired
    preference training it is the pair.

    Args:
        seed: Seed of GAST's own generator.
        layers: Path of the decoder layers, if their structure does not identify them.
        support_set: Rows for support "dataset", in the form in which the Trainer's training rows reach its collator.
        target: The same: a few rows of the target task. Other options then default to `GASTSettings.with_target`
            (ours).
        pairs: Row i and row i + B/2 are one sample, as in TRL's preference trainers; None: decided by the Trainer's
            collator.
        keep: Keep the choices of all batches in `history`.

    Attributes:
        last: The `SampleChoice` in the last batch: `scores` (layers, samples) float32, `selected` (layers, K) int64.
        history: The choices of all batches, if `keep` is set.
        on_select: Callback for each batch's choice, optional.

    Raises:
        RecipeError: A setting is out of its range.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[GAST(select=0.75)])
        >>> output = trainer.train()
        >>> GAST(target=rows).support
        'dataset'
        >>> with GAST(select=2, support="rest").attach(model) as sift:
        ...     model(**batch).loss.backward()
        ...     sift.last.scores.shape, sift.last.selected.shape  # four layers, two of four rows
        (torch.Size([4, 4]), torch.Size([4, 2]))
    """

    def rule(self, groups: Sequence[LayerGroup]) -> AlignedSamples:
        """Samples by alignment, for each layer."""
        return AlignedSamples(self, groups)

    @property
    def support_source(self) -> str | None:
        """Source of the support rows."""
        return self.support if self.needs_rows else None
