"""Base of the callbacks that choose samples: a `SampleSelection` for the time of a training run."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from siftune.base.errors import RecipeError, UnsupportedError
from siftune.base.text import counted
from siftune.engine.compiled import forget_compiled
from siftune.engine.groups import LayerGroup
from siftune.methods.drivers.batches import RowDraws, UserBatches
from siftune.methods.drivers.sample_choice import Choosing, SampleChoice
from siftune.methods.drivers.sample_driver import SampleRule, SampleSelection
from siftune.methods.host import deepspeed
from siftune.methods.host.callback import (
    SelectionCallback,
    calling_trainer,
    optimizer_to_training,
    plain_optimizer,
    restored_on_interrupt,
    resumed_from,
    rows_of_pass,
    trainer_loss,
    while_training,
)
from siftune.methods.host.row_numbers import RowNumbers, row_numbers
from siftune.methods.host.spread import refuse_wrappers
from siftune.methods.options import selects_all
from siftune.models.loss import Batch, Loss, model_loss

logger = logging.getLogger(__name__)

_WAITING = 10  # choices on the device at most


@dataclass(eq=False, repr=False)
class SampleCallback(SelectionCallback[SampleSelection]):
    """A callback that chooses the samples of every batch; subclasses define settings and a rule.

    Choices are per forward pass: with gradient accumulation per micro-batch, with several ranks per rank's part of the
    batch. Parameters outside of the decoder layers follow all samples. The choices' `figures` are added to the
    Trainer's log as `GROUP/followed` and so on, means over this rank's batches.
    """

    support_set: Any = field(default=None, repr=False)
    pairs: bool | None = None
    keep: bool = False
    select_until: float = field(default=1.0, kw_only=True)
    on_select: Callable[[SampleChoice], None] | None = field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.select_until <= 1:
            raise RecipeError(f"select_until is {self.select_until!r}, but must be from 0 to 1")
        self.history: list[SampleChoice] = []
        self._numbers: RowNumbers | None = None
        self._waiting: list[Choosing] = []

    @abstractmethod
    def rule(self, groups: Sequence[LayerGroup]) -> SampleRule:
        """Make the rule of a training run."""

    @property
    @abstractmethod
    def support_source(self) -> str | None:
        """Source of support rows: "sample", the training set; "dataset", `support_set`; None: there are none."""

    @property
    def last(self) -> SampleChoice | None:
        """The choice in the last batch; None before training."""
        return self._selection.last if self._selection else None

    def attach(
        self,
        model: nn.Module,
        *,
        batches: Iterable[Batch] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        loss: Loss = model_loss,
    ) -> SampleSelection:
        """Select samples in a custom training loop.

        Args:
            model: Causal LM with adapters.
            batches: Support sets, one per step, if the method compares with rows; restarted at the end.
            optimizer: If passed, its steps drive the selection; else call `end()` before and `step()` after each.
                GAST's support "rest" needs neither.
            loss: Loss of a support batch, a scalar.

        Returns:
            A context manager; `last` is the choice in the last batch that went backward.

        Raises:
            RecipeError: `batches` is missing.
            UnsupportedError: The optimizer is DeepSpeed's.
        """
        if batches is None and self.support_source is not None:
            raise RecipeError(
                f"{type(self).__name__} compares with support rows: pass attach(..., batches=...), or with GAST set "
                'support="rest"'
            )
        deepspeed.refuse_in_loops(optimizer)
        forget_compiled()
        draws = None if batches is None else UserBatches(batches)
        selection = SampleSelection(
            model, self.rule, seed=self.seed, draws=draws, loss=loss, layers=self.layers, pairs=bool(self.pairs)
        )
        optimizer = plain_optimizer(optimizer)
        if optimizer is not None:
            selection.follow(optimizer)
        selection.begin_before_forward()
        return selection

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the layers, set the tape, and continue from a checkpoint's state."""
        self._clear()
        refuse_wrappers(args, kwargs["model"])
        if args.torch_compile:
            forget_compiled()
        self._waiting = []
        trainer = calling_trainer(self)
        samples = rows_of_pass(args, trainer)
        if selects_all(self, samples):
            logger.warning(
                "%s(select=%s) follows every row of a forward pass of %s, so none is left out: raise "
                "per_device_train_batch_size",
                type(self).__name__,
                self.select,
                counted(samples, "row"),
            )
        loader = kwargs.get("train_dataloader")
        self._lines.begin(trainer)
        deepspeed.keep_unsharded(trainer, kwargs["model"], self.layers)
        collate = getattr(loader, "collate_fn", None)
        _refuse_packing(args, collate)
        selection = self._selection = SampleSelection(
            kwargs["model"],
            self.rule,
            seed=self.seed,
            loss=trainer_loss(self),
            layers=self.layers,
            chunk=samples,
            pairs=_are_pairs(trainer, collate) if self.pairs is None else self.pairs,
            compiled=bool(args.torch_compile),
            alive=while_training(trainer),
        )
        if self.select_until < 1:
            selection.rule.until = round(self.select_until * state.max_steps)
        selection.numbers = self._numbers = None if trainer is None else row_numbers(trainer)
        if self.support_source is not None:
            rows = None if self.support_source == "sample" else self._user_rows()
            instead = 'use GAST with support="rest", which needs none'
            selection.draws = RowDraws.of_loader(loader, selection.generator, instead, rows)
        self._guard(trainer)
        if self._resume(state) and not selection.rule.follows_all(state.global_step):  # else the mean is not needed
            self._load_mean(selection)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Number the rows of the batches if possible."""
        if self._numbers is not None:
            self._numbers.number(kwargs.get("train_dataloader"))

    def remove(self) -> None:
        """Remove all hooks from model and Trainer."""
        super().remove()
        if self._numbers is not None:
            self._numbers.release()
            self._numbers = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the support set of this optimizer step."""
        selection = self._begun
        if self.support_source is not None:  # the Trainer does so before each batch, but later
            kwargs["model"].train()
            optimizer_to_training(kwargs.get("optimizer"))
        selection.steps = state.global_step
        with restored_on_interrupt(calling_trainer(self)):
            selection.begin()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the choice of a micro-batch."""
        self._report()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the choice of the step's last batch, and move the running mean."""
        assert self._selection is not None
        self._report()
        self._selection.end()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the running mean into the checkpoint."""
        assert self._selection is not None
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        tensors = self._selection.mean_tensors()
        if tensors and state.is_world_process_zero and folder.is_dir():
            save_file({name: mean.contiguous() for name, mean in tensors.items()}, folder / self._mean_file)

    @property
    def _mean_file(self) -> str:
        """Name of the running mean in a checkpoint."""
        return f"{self.group}_mean.safetensors"

    def _report(self) -> None:
        """Note the choice in the last batch. If nobody reads it now, it waits on its device for the log."""
        assert self._selection is not None
        if self._selection.choosing is not None:
            self._waiting.append(self._selection.choosing)
        if self.keep or self.on_select is not None or len(self._waiting) >= _WAITING:
            self._settle()

    def _settle(self) -> None:
        waiting, self._waiting = self._waiting, []
        for choice in (choosing.done() for choosing in waiting):
            if choice is None:
                continue
            self._means.note(choice.figures())
            if self.keep:
                self.history.append(choice)
            if self.on_select is not None:
                self.on_select(choice)

    def _figures(self) -> dict[str, float]:
        self._settle()
        return super()._figures()

    def _user_rows(self) -> Any:
        if self.support_set is None:
            name = type(self).__name__
            raise RecipeError(
                f'support="dataset" needs rows: pass {name}(support_set=...), in the form of the training rows; if you '
                "did, turn restore_callback_states_from_checkpoint off, which loses them: the checkpoint has the state"
            )
        return self.support_set

    def _load_mean(self, selection: SampleSelection) -> None:
        """Read the running mean from the checkpoint."""
        support = selection.rule.support
        if support is None or not support.lasts:
            return
        folder = resumed_from(self)
        if folder is None or not (folder / self._mean_file).is_file():
            raise RecipeError(
                f"the checkpoint {folder or ''} has no {self._mean_file} with the running mean of support gradients: "
                "resume from another checkpoint, or with support_every=1"
            )
        selection.load_mean_tensors(load_file(folder / self._mean_file))


def _refuse_packing(args: TrainingArguments, collate: Any) -> None:
    """Refuse rows that hold several samples, judging by arguments and collator."""
    packed = [name for name in ("packing", "padding_free") if getattr(args, name, False)]
    flattening = getattr(collate, "padding_free", False) or "Flattening" in type(collate).__name__
    if packed or flattening:
        raise UnsupportedError(
            f"{' and '.join(packed) or type(collate).__name__} puts several samples into one row, where they "
            "cannot be selected separately: turn packing and padding_free off"
        )


def _are_pairs(trainer: Trainer | None, collate: Any) -> bool:
    """Whether the batches hold chosen rows first and rejected rows second, as TRL's paired preference trainers do."""
    if {"DPOTrainer", "RewardTrainer"} & {kind.__name__ for kind in type(trainer).__mro__}:
        return True  # whatever collator the user gave it
    collators = (collate, getattr(trainer, "data_collator", None))
    names = [kind.__name__ for c in collators if c is not None for kind in type(c).__mro__]
    triple = next((name for name in names if "TriplePreference" in name), None)
    if triple is not None:
        raise UnsupportedError(f"{triple} makes three rows of one sample, but samples must be rows or pairs")
    paired = ("Preference" in name or "DPO" in name for name in names if "Unpaired" not in name)
    return any(paired)
