"""Trim for any transformers Trainer, and for plain training loops."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from siftune.base.errors import RecipeError, UnsupportedError
from siftune.base.settings import documented
from siftune.engine.groups import LayerGroup
from siftune.methods.drivers.sample_callback import SampleCallback
from siftune.methods.drivers.sample_driver import SampleSelection
from siftune.methods.trim.rule import TrimmedSamples
from siftune.methods.trim.settings import TrimSettings
from siftune.models.loss import row_losses


@documented
@dataclass(eq=False)
class Trim(SampleCallback, TrimSettings):
    """Trim: all layers follow the rows of a batch with the smallest loss, or the largest, or any (arXiv 1810.11874).

    The losses are those of training's own forward pass, so that nothing is computed for the choice. Parameters outside
    of the decoder layers follow all rows.

    Args:
        seed: Seed of Trim's own generator.
        layers: Path of the decoder layers, where they are not found by structure.
        support_set: Refused: rows are compared with none.
        pairs: As of every method that chooses rows; pairs are refused when a batch comes.
        keep: Keep the choices of all batches in `history`.

    Attributes:
        last: The `SampleChoice` in the last batch: `scores` (1, rows), losses; `selected` (1, K) int64.
        history: The choices of all batches, where `keep` is set.
        on_select: Called with each batch's choice, where set.

    Raises:
        RecipeError: When a setting is out of its range.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[Trim(select=0.75)])
        >>> output = trainer.train()
    """

    def __post_init__(self) -> None:
        """Check the settings, and begin without a model."""
        super().__post_init__()
        if self.support_set is not None:
            raise RecipeError("trim compares rows with none: leave support_set out")
        self._found: Tensor | None = None

    def rule(self, groups: Sequence[LayerGroup]) -> TrimmedSamples:
        """Rows by what they cost."""
        return TrimmedSamples(self, groups, self._losses)

    @property
    def support_source(self) -> str | None:
        """There are no support rows."""
        return None

    def attach(self, model: nn.Module, **given: Any) -> SampleSelection:
        """Select samples in a plain training loop, in which the model is called with `labels`; see `SampleCallback`."""
        selection = super().attach(model, **given)
        selection.on_remove(self._watch(model))
        return selection

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the layers, set the tape, and look at the losses of training's forward passes."""
        super().on_train_begin(args, state, control, **kwargs)
        assert self._selection is not None
        self._selection.on_remove(self._watch(kwargs["model"]))

    def _watch(self, model: nn.Module) -> Any:
        return model.register_forward_hook(self._look, with_kwargs=True)

    def _look(self, _: nn.Module, __: Any, given: dict[str, Any], output: Any) -> None:
        """Note the losses of a pass that goes backward; its labels are the model's, or the Trainer has them."""
        if not torch.is_grad_enabled():
            return
        numbers = self._numbers
        labels = given.get("labels") if numbers is None or not numbers.at_work else numbers.labels
        self._found = None if labels is None else row_losses(output, labels)[0]

    def _losses(self) -> Tensor:
        if self._found is None:
            raise UnsupportedError("trim keeps rows by their losses: the model must be called with labels in the batch")
        return self._found
