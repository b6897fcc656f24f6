"""GAST for any transformers Trainer and for custom training loops; the equations are in `maths`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from siftune.base.settings import documented
from siftune.engine.groups import LayerGroup
from siftune.engine.tape import SampleGradients
from siftune.methods.drivers.sample_callback import SampleCallback
from siftune.methods.drivers.sample_choice import Choosing, Unit, units_of
from siftune.methods.drivers.sample_driver import SampleRule, summed
from siftune.methods.drivers.support import Gradients, Support
from siftune.methods.gast import maths
from siftune.methods.gast.maths import Scored, live_samples, score_samples
from siftune.methods.options import GASTSettings


class AlignedSamples(SampleRule):
    """Chooses samples by the alignment of their gradients with the support's, separately for each layer."""

    def __init__(self, settings: GASTSettings, groups: Sequence[LayerGroup]) -> None:
        super().__init__(units_of(groups), settings.select)
        self.settings = settings
        self.support = Support(settings.support_size, settings.support_every) if settings.needs_rows else None
        self._unit = {unit.layer: unit for unit in self.units}

    def reduce(self, choosing: Choosing, layers: Sequence[tuple[LayerGroup, SampleGradients]]) -> Gradients:
        """Choose the samples for some layers, and add up their gradients."""
        reduced: Gradients = {}
        for group, grads in layers:
            unit = self._unit[group.index]
            own = {p: grads[p] for p in unit.parameters if p in grads}
            if own:
                reduced |= self._follow(choosing, unit, self._score(own), own)
        return reduced

    def _follow(self, choosing: Choosing, unit: Unit, scored: Scored, grads: SampleGradients) -> Gradients:
        """Choose by scores, and add up the gradients of the chosen samples."""
        uniform_S = choosing.uniform_on(scored.scores.device)[unit.place]
        chosen_K = maths.choose(scored.scores, scored.live, uniform_S, choosing.count, self.settings)
        choosing.note(unit, scored.scores if self.settings.needs_scores else None, chosen_K)
        scale = maths.factor(scored.live, chosen_K)
        scale = scale + (scored.scores * 0).sum()  # NaN if a score is not finite
        return summed(grads, chosen_K, scale)

    def _score(self, grads: SampleGradients) -> Scored:
        """Score the samples of a batch by the gradients of one unit."""
        settings, parts = self.settings, list(grads.values())
        if not settings.needs_scores:
            live_S = live_samples(parts)
            return Scored(torch.zeros_like(live_S, dtype=torch.float32), live_S)
        others: list[Tensor] | None = None  # the batch's other samples
        if self.support is not None:
            support = self.support.gradients
            others = [support[p] if p in support else torch.zeros_like(part[0]) for p, part in grads.items()]
        return score_samples(parts, others, settings.score == "cosine")


@documented
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
            With a few rows of the target task, take the options of `with_target` too, as `siftune train` does (ours).
        pairs: Row i and row i + B/2 are one sample, as in TRL's preference trainers; None: decided by the Trainer's
            collator.
        keep: Keep the choices of all batches in `history`.
        select_until: Share of the Trainer's steps, the first ones, in which samples are selected.
        on_select: Callback for each batch's choice, optional.

    Attributes:
        last: The `SampleChoice` in the last batch: `scores` (layers, samples) float32, `selected` (layers, K) int64.
        history: The choices of all batches, if `keep` is set.

    Raises:
        RecipeError: A setting is out of its range.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[GAST(select=0.75)])
        >>> output = trainer.train()
        >>> GAST(**GAST.with_target, support_set=rows).support
        'dataset'
        >>> with GAST(select=2, support="rest").attach(model) as selection:
        ...     model(**batch).loss.backward()
        ...     selection.last.scores.shape, selection.last.selected.shape  # four layers, two of four rows
        (torch.Size([4, 4]), torch.Size([4, 2]))
    """

    def rule(self, groups: Sequence[LayerGroup]) -> AlignedSamples:
        """Samples by alignment, for each layer."""
        return AlignedSamples(self, groups)

    @property
    def support_source(self) -> str | None:
        """Source of the support rows."""
        return self.support if self.needs_rows else None
