"""Trim: the rows of a batch with the smallest loss.

Trimmed loss: Shen & Sanghavi, "Learning with Bad Training Data via Iterative Trimmed Loss Minimization", ICML 2019,
arXiv 1810.11874; within a batch, as in co-teaching (Han et al., NeurIPS 2018, arXiv 1804.06872). With l_i the mean
token loss of row i, K of B rows are followed:

    choice     the K rows of the smallest l_i
    gradient   (B/K) · Σ_{i chosen} g_i

Ours: the choice is per batch instead of per pass over all rows. A row's loss is the mean over its tokens, so that long
rows are not penalized. The factor B/K makes a step as long as one on all rows.

Symbols: B rows, K chosen. l_i `losses_B`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from siftune.base.errors import RecipeError, UnsupportedError
from siftune.base.settings import documented
from siftune.engine.groups import LayerGroup
from siftune.engine.tape import SampleGradients
from siftune.methods.drivers.sample_callback import SampleCallback
from siftune.methods.drivers.sample_choice import Choosing, model_unit
from siftune.methods.drivers.sample_driver import SampleRule, SampleSelection, summed
from siftune.methods.drivers.support import Gradients
from siftune.methods.options import TrimSettings
from siftune.models.loss import row_losses


def smallest(losses_B: Tensor, count: int) -> Tensor:
    """Choose the rows of the smallest loss.

    Args:
        losses_B: (B,) mean token losses, NaN for rows without a label, which are chosen only if there are too few.
        count: K ≤ B.

    Returns:
        (K,) int64 row numbers, ascending.

    Example:
        >>> smallest(torch.tensor([0.5, torch.nan, 0.1, 0.9]), 2)
        tensor([0, 2])
    """
    return losses_B.where(~losses_B.isnan(), torch.inf).argsort(stable=True)[:count].sort().values


def factor(losses_B: Tensor, chosen_K: Tensor) -> Tensor:
    """B/K among the rows that have a label; a scalar in the dtype of the losses."""
    live_B = ~losses_B.isnan()
    return live_B.sum().to(losses_B.dtype) / live_B[chosen_K].sum().clamp_min(1)


class TrimmedSamples(SampleRule):
    """Chooses rows by their loss, once for all layers.

    `losses` returns the mean token losses, (B,), of the last forward pass.
    """

    def __init__(self, settings: TrimSettings, groups: Sequence[LayerGroup], losses: Callable[[], Tensor]) -> None:
        super().__init__([model_unit(groups)], settings.select)
        self._losses = losses
        self._chosen: tuple[Choosing, Tensor, Tensor] | None = None  # the batch, its chosen rows, their factor

    def reduce(self, choosing: Choosing, layers: Sequence[tuple[LayerGroup, SampleGradients]]) -> Gradients:
        """Choose rows at the first layer of a batch, and add up their gradients."""
        grads = {parameter: part for _, parts in layers for parameter, part in parts.items()}
        if self._chosen is None or self._chosen[0] is not choosing:
            losses_B = self._losses()
            if len(losses_B) != choosing.samples:
                raise UnsupportedError(
                    f"trim selects rows by their losses, but a batch of {choosing.samples} samples has {len(losses_B)} "
                    "rows: pairs, as in preference training, are not supported; use gast"
                )
            chosen_K = smallest(losses_B, choosing.count)
            choosing.note(self.units[0], losses_B, chosen_K)
            self._chosen = (choosing, chosen_K, factor(losses_B, chosen_K))
        _, chosen_K, scale = self._chosen
        return summed(grads, chosen_K, scale)

    def end(self) -> None:
        """Release the batch."""
        self._chosen = None


@documented
@dataclass(eq=False)
class Trim(SampleCallback, TrimSettings):
    """Trim: all layers follow the rows of a batch with the smallest loss (arXiv 1810.11874).

    The losses come from the forward pass of training itself, so the choice costs nothing. Parameters outside of the
    decoder layers follow all rows.

    Args:
        seed: Unused; every method has one.
        layers: Path of the decoder layers, if their structure does not identify them.
        support_set: Not supported: rows are compared with none.
        pairs: As for every method that selects rows; a batch of pairs raises an error.
        keep: Keep the choices of all batches in `history`.

    Attributes:
        last: The `SampleChoice` in the last batch: `scores` (1, rows), losses; `selected` (1, K) int64.
        history: The choices of all batches, if `keep` is set.
        on_select: Callback for each batch's choice, optional.

    Raises:
        RecipeError: A setting is out of its range.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[Trim(select=0.75)])
        >>> output = trainer.train()
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.support_set is not None:
            raise RecipeError("trim compares rows with none: leave support_set out")
        self._batch_losses: Tensor | None = None

    def rule(self, groups: Sequence[LayerGroup]) -> TrimmedSamples:
        """Rows by their loss."""
        return TrimmedSamples(self, groups, self._losses)

    @property
    def support_source(self) -> str | None:
        """None: there are no support rows."""
        return None

    def attach(self, model: nn.Module, **options: Any) -> SampleSelection:
        """Select samples in a custom training loop that calls the model with `labels`; see `SampleCallback`."""
        selection = super().attach(model, **options)
        selection.on_remove(self._watch(model))
        return selection

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the layers, set the tape, and read the losses of training's forward passes."""
        super().on_train_begin(args, state, control, **kwargs)
        assert self._selection is not None
        self._selection.on_remove(self._watch(kwargs["model"]))

    def _watch(self, model: nn.Module) -> Any:
        return model.register_forward_hook(self._read_losses, with_kwargs=True)

    def _read_losses(self, _: nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Note the losses of a pass that goes backward; the labels are in the call, or the Trainer has them."""
        if not torch.is_grad_enabled():
            return
        numbers = self._numbers
        labels = kwargs.get("labels") if numbers is None or not numbers.at_work else numbers.labels
        self._batch_losses = None if labels is None else row_losses(output, labels)[0]

    def _losses(self) -> Tensor:
        if self._batch_losses is None:
            raise UnsupportedError("trim selects rows by their losses: call the model with labels in the batch")
        return self._batch_losses
