"""GAST for any transformers Trainer, and for plain training loops."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from siftune.base.errors import RecipeError
from siftune.base.settings import documented
from siftune.engine.groups import LayerGroup
from siftune.methods.drivers.sample_callback import SampleCallback, takes_target
from siftune.methods.gast.rule import AlignedSamples
from siftune.methods.gast.settings import GASTSettings
from siftune.methods.host import deepspeed
from siftune.methods.host.callback import calling_trainer


@documented
@takes_target
@dataclass(eq=False)
class GAST(SampleCallback, GASTSettings):
    """Gradient-aligned Sparse Tuning: every layer follows the samples that point its way (arXiv 2603.09865).

    Scores and choices are made per forward pass: with gradient accumulation in each micro-batch, with several ranks in
    each rank's part of the batch. With `among="recent"` a row's chance is the same however a step is divided.
    Parameters outside of the decoder layers follow all samples. A sample is a row; in paired preference training it is
    the pair.

    Args:
        seed: Seed of GAST's own generator.
        layers: Path of the decoder layers, where they are not found by structure.
        support_set: Rows for support "dataset", prepared as the Trainer's training rows are when they reach its
            collator.
        target: The same, few rows of the task that counts; settings that are not given then have the defaults of
            `GASTSettings.with_target` (ours).
        pairs: Row i and row i + B/2 are one sample, as TRL's preference trainers lay them out; None: found out from the
            Trainer's collator.
        keep: Keep the choices of all batches in `history`.

    Attributes:
        last: The `SampleChoice` in the last batch: `scores` (layers, samples) float32, `selected` (layers, K) int64,
            filled up with -1 where layers follow different numbers of samples.
        history: The choices of all batches, where `keep` is set.
        on_select: Called with each batch's choice, where set.

    Raises:
        RecipeError: When a setting is out of its range.

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
        """Where support rows come from."""
        return self.support if self.needs_rows else None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As for all methods that choose rows; under DeepSpeed refuse a score by Adam's state."""
        if self.in_metric:
            deepspeed.refuse(calling_trainer(self), f'score="{self.score}" takes Adam\'s state', 'take score="cosine"')
        super().on_train_begin(args, state, control, **kwargs)

    def _check_attach(self, batches: Any, optimizer: Any) -> None:
        super()._check_attach(batches, optimizer)
        if self.select_until < 1:
            raise RecipeError(
                "select_until is a share of a Trainer's steps, and nobody knows how many a loop has: leave it out, and "
                "call remove() where selection is to end"
            )
        if optimizer is None and self.in_metric:
            raise RecipeError(f'score="{self.score}" takes Adam\'s metric: give attach(..., optimizer=...).')
