"""Base of the callbacks that choose layers: a `LayerSelection` for the time of a training run."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from siftune.engine.compiled import forget_compiled
from siftune.methods.drivers.batches import RowDraws, UserBatches
from siftune.methods.drivers.layer_driver import LayerChoice, LayerPolicy, LayerSelection, LayerStack
from siftune.methods.host import deepspeed
from siftune.methods.host.callback import (
    SelectionCallback,
    calling_trainer,
    optimizer_to_training,
    plain_optimizer,
    restored_on_interrupt,
    rows_of_pass,
    trainer_loss,
    while_training,
)
from siftune.methods.host.spread import refuse_wrappers
from siftune.models.loss import Batch, Loss, model_loss


@dataclass(eq=False, repr=False)
class LayerCallback(SelectionCallback[LayerSelection]):
    """A callback that chooses the layers of every step; subclasses define settings and a policy.

    It adds to the Trainer's log `GROUP/layers`, the mean number of layers that train in a step. With importance it also
    adds `GROUP/importance_spread`, the highest minus the lowest.
    """

    on_select: Callable[[LayerChoice], None] | None = field(default=None, repr=False, kw_only=True)
    _chooses_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._step: int | None = None

    def _figures(self) -> dict[str, float]:
        figures, importance = super()._figures(), self.importance
        if figures and importance is not None:
            figures["importance_spread"] = float(importance.max() - importance.min())
        return figures

    @abstractmethod
    def policy(self, stack: LayerStack, generator: torch.Generator) -> LayerPolicy:
        """Make the policy of a training run."""

    @property
    def last(self) -> LayerChoice | None:
        """The choice of the current step; None before training."""
        return self._selection.last if self._selection else None

    @property
    def importance(self) -> Tensor | None:
        """(L,) float64 importance logits, high = important; None before training or without any."""
        return self._selection.importance if self._selection else None

    def attach(self, model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None) -> LayerSelection:
        """Select layers in a custom training loop.

        Args:
            model: Causal LM with adapters.
            optimizer: If passed, its steps drive the selection; else call `step()` after each step.

        Returns:
            A context manager; `last.layers` are the layers that train now.
        """
        return self._attach(model, optimizer=optimizer)

    def _attach(
        self,
        model: nn.Module,
        batches: Iterable[Batch] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        loss: Loss = model_loss,
    ) -> LayerSelection:
        """Put a selection on a model, and choose the first step's layers.

        Raises:
            UnsupportedError: The optimizer is DeepSpeed's.
        """
        deepspeed.refuse_in_loops(optimizer)
        forget_compiled()
        draws = UserBatches(batches) if batches is not None else None
        optimizer = plain_optimizer(optimizer)
        selection = LayerSelection(model, self.policy, seed=self.seed, draws=draws, loss=loss, layers=self.layers)
        selection.begin()
        if optimizer is not None:
            selection.follow(optimizer)
        return selection

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the layers, set the gates, and continue from a checkpoint's state."""
        self._clear()
        model: nn.Module = kwargs["model"]
        refuse_wrappers(args, model)
        if args.torch_compile:
            forget_compiled()
        trainer = calling_trainer(self)
        self._lines.begin(trainer)
        deepspeed.keep_unsharded(trainer, model, self.layers)
        selection = self._selection = LayerSelection(
            model,
            self.policy,
            seed=self.seed,
            loss=trainer_loss(self),
            layers=self.layers,
            chunk=rows_of_pass(args, trainer),
            alive=while_training(trainer),
        )
        if deepspeed.is_used(trainer):
            optimizer = plain_optimizer(kwargs.get("optimizer"))
            selection.on_remove(deepspeed.skip(optimizer, lambda: selection.idle))
        loader = kwargs.get("train_dataloader")
        if loader is not None and selection.policy.needs_rows:
            selection.draws = RowDraws.of_loader(loader, selection.generator, "use RST, which needs none")
        self._guard(trainer)
        self._step = None
        self._resume(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the layers of this optimizer step."""
        selection = self._begun
        if self._step == state.global_step:  # a stream ended in mid-step, which the Trainer continues as if it began
            return
        self._step = state.global_step
        optimizer_to_training(kwargs.get("optimizer"))
        selection.steps = state.global_step
        with restored_on_interrupt(calling_trainer(self)):
            choice = selection.begin()
        self._means.note({"layers": len(choice.layers)})
        if self.on_select is not None:
            self.on_select(choice)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the optimizer skip inactive layers."""
        assert self._selection is not None
        self._selection.drop_inactive_grads()
