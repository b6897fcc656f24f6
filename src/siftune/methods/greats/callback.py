"""GREATS for any transformers Trainer, and for plain training loops."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from siftune.base.errors import RecipeError
from siftune.base.settings import documented
from siftune.engine.groups import LayerGroup
from siftune.methods.drivers.sample_callback import SampleCallback, takes_target
from siftune.methods.greats.rule import HelpfulSamples
from siftune.methods.greats.settings import GREATSSettings


@documented
@takes_target
@dataclass(eq=False)
class GREATS(SampleCallback, GREATSSettings):
    """GREATS: all layers follow the samples that most help a support set (Wang et al., NeurIPS 2024).

    Choices are made per forward pass, as GAST's are. The gradients of all samples for all layers are held until
    backward is through: for adapters on a 7B model, rank 32, 16 rows, 1.8 GB in bfloat16.

    Args:
        seed: Seed of GREATS' own generator.
        layers: Path of the decoder layers, where they are not found by structure.
        support_set: Rows for support "dataset", prepared as the Trainer's training rows are when they reach its
            collator.
        target: The same, few rows of the task that counts.
        pairs: Row i and row i + B/2 are one sample, as TRL's preference trainers lay them out; None: found out from the
            Trainer's collator.
        keep: Keep the choices of all batches in `history`.

    Attributes:
        last: The `SampleChoice` in the last batch: `scores` (1, samples), ⟨h, g⟩; `selected` (1, K) int64.
        history: The choices of all batches, where `keep` is set.
        on_select: Called with each batch's choice, where set.

    Raises:
        RecipeError: When a setting is out of its range.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[GREATS(select=0.5)])
        >>> output = trainer.train()
    """

    def rule(self, groups: Sequence[LayerGroup]) -> HelpfulSamples:
        """Samples by what they do for the support set."""
        return HelpfulSamples(self, groups)

    @property
    def support_source(self) -> str | None:
        """Where support rows come from."""
        return self.support

    def _check_attach(self, batches: Any, optimizer: Any) -> None:
        super()._check_attach(batches, optimizer)
        if optimizer is None:
            raise RecipeError("GREATS takes the optimizer's learning rate: give attach(..., optimizer=...).")
