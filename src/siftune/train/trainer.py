"""The Trainer of siftune's own training path: transformers' Trainer with a cheaper loss and a guard.

Logits are computed only at label positions. The first step compares the loss with the model's own. If they differ, as
with the auxiliary loss of a mixture of experts, the model's own loss is used, with a warning. A non-finite loss or
gradient never reaches the weights; see `guards.non_finite`.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from siftune.base.environment import reset_peak_memory
from siftune.base.errors import InputError, UnsupportedError
from siftune.base.ranks import mean_over_ranks
from siftune.data.batches import AIMED, ROW, TargetLast
from siftune.data.rows import WEIGHT
from siftune.methods.dp.callback import DP
from siftune.methods.dp.driver import finite_sum
from siftune.methods.host.spread import average_adapters
from siftune.models import attention
from siftune.models.adapters.full import OpenLayers
from siftune.models.loss import (
    by_row,
    difference_from_model,
    label_positions,
    logits_at,
    losses_agree,
    mean_loss,
    row_losses,
    token_losses,
    weighed,
)
from siftune.models.modules import evaluating
from siftune.train.folder.checkpoints import begin, best_in, is_complete, read_of
from siftune.train.folder.saving import Sealing, checkpoint_of
from siftune.train.folder.weights import About, put_in, read_tuned, save_tuned, write_adapter
from siftune.train.guards.non_finite import BrokenSteps

logger = logging.getLogger(__name__)


class _ByLength(LengthGroupedSampler):  # type: ignore[misc]
    """transformers' sampler; its order depends on seed and epoch alone, so that a resumed run has the same one."""

    def __init__(self, together: int, lengths: Sequence[int], seed: int) -> None:
        super().__init__(together, lengths=list(lengths))
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        order: Iterator[int] = super().__iter__()
        return order


class SiftTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer, with logits only at label positions.

    It takes the Trainer's arguments except `compute_loss_func`, which it sets.

    Args:
        last: Share of the steps, the last ones, that train on rows with the column `aimed`.
        privacy: Differential privacy: every step draws its rows, clips their gradients and adds noise. A batch is then
            a step's, and the loss is the mean over its rows of each row's mean token loss; rows without a finite loss
            are left out, and without rows it is 0. Evaluations measure the mean over label tokens, as without privacy.
        broken: Guard against non-finite steps, which a private Trainer does not use; by default it skips none.
        short_rows: Whether to use the attention of `models.attention` for short rows.
    """

    rows: Sequence[int] = ()  # numbers of the rows in the last training batch, if they are numbered
    kept_step: int | None = None  # step of the best weights, loaded at the end; None: the last step's are kept
    label_losses: Tensor | None = None  # (N,) float32 losses of the batch's label tokens, in row-major order
    row_losses: Tensor | None = None  # (2, B) float32 of the last training batch: see `models.loss.by_row`

    def __init__(
        self,
        *args: Any,
        callbacks: list[TrainerCallback] | None = None,
        last: float = 1.0,
        privacy: DP | None = None,
        broken: BrokenSteps | None = None,
        short_rows: bool = False,
        **kwargs: Any,
    ) -> None:
        # set here, as the Trainer counts the labels of a step before the first loss
        kwargs["compute_loss_func"] = self._label_loss if privacy is None else self._row_loss
        self.broken = broken or BrokenSteps(0)
        guards, private = ([self.broken], []) if privacy is None else ([], [privacy])
        own = [*guards, *(callbacks or []), *private, Sealing()]
        super().__init__(*args, callbacks=own, **kwargs)
        average_adapters(self)  # unless a method has done so
        self.privacy = privacy
        self._last = last
        self._attention = attention.short_rows if short_rows else nullcontext
        self._label_logits_only: bool | None = None
        self._weights: Tensor | None = None  # of the rows in the current batch
        self._private_losses: list[Tensor] = []  # (B,) of the passes of a private step
        self._warned = False  # of a row without effect
        self._evaluates = False
        self._held_out: list[tuple[Any, Tensor]] = []  # row numbers and losses of the batches of an evaluation
        self._tokens: Tensor | None = None  # without padding, since the state was brought up to date

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`."""
        reset_peak_memory()  # of an attempt with larger batches, or of another run in this process
        with self._attention():
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.evaluate`. Losses that are not finite are left out of the mean, as by default."""
        before, self.args.logging_nan_inf_filter = (
            self.args.logging_nan_inf_filter,
            True,
        )  # in training, `_logged` does so
        self._held_out, self._evaluates = [], True
        try:
            with self._attention():
                return super().evaluate(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter, self._evaluates = before, False

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.prediction_step`. Losses of numbered rows are kept, for `held_out_losses`."""
        self.label_losses = None
        result = super().prediction_step(model, inputs, *args, **kwargs)
        if ROW in inputs and self.label_losses is not None:
            self._held_out.append((inputs[ROW], by_row(self.label_losses, inputs["labels"])))
        return result

    def held_out_losses(self) -> NDArray[np.float64]:
        """Number, mean loss in nats and label tokens of the rows of the last evaluation on this rank; (3, V)."""
        if not self._held_out:
            return np.zeros((3, 0))
        numbers, losses = zip(*self._held_out, strict=True)
        return np.concatenate([np.concatenate(numbers)[None], torch.cat(losses, 1).cpu().double().numpy()])

    def get_train_dataloader(self) -> Any:
        """The Trainer's batches; in a private run a batch is a step's."""
        if self.privacy is None:
            return super().get_train_dataloader()
        return self.accelerator.prepare(self.privacy.loader(self.train_dataset, self.data_collator))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        """The Trainer's sampler, or one that puts rows of a length together, or a target's rows last."""
        data = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length":
            together = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return _ByLength(together, data["length"], self.args.seed)
        marks = data[AIMED] if AIMED in data.column_names else []
        if len(set(marks)) < 2:
            return super()._get_train_sampler(train_dataset)
        epochs = planned_steps(self.args, len(data)) / steps_per_epoch(self.args, len(data))
        return TargetLast(marks, round(epochs * len(data)), self._last, self.args.seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of a batch; see `transformers.Trainer.compute_loss` for the arguments."""
        self._weights = inputs.get(WEIGHT)
        inputs = {name: value for name, value in inputs.items() if name not in (ROW, WEIGHT)}  # not the model's
        if self._label_logits_only is None and (self.privacy is not None or self._all_have_labels(inputs["labels"])):
            self._label_logits_only = self._agrees(model, inputs if self.privacy is None else _fixed_row())
            if not self._label_logits_only:
                self._refuse_own_loss(model)
                self.compute_loss_func = None
        if self._label_logits_only is False:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            logits, labels = getattr(outputs, "logits", None), inputs["labels"]
            if isinstance(logits, Tensor) and logits.shape[:2] == labels.shape:  # otherwise the log has no sources
                at_labels = logits.detach()[label_positions(labels).to(logits.device)]
                self.label_losses = token_losses(at_labels[None], labels)
            return (loss, outputs) if return_outputs else loss
        with logits_at(model, label_positions(inputs["labels"])):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward pass of a batch."""
        self.rows = inputs[ROW].tolist() if ROW in inputs else []  # an array
        self.label_losses = None
        if self.privacy is not None:
            return self._private_step(model, inputs, self.privacy)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.row_losses = None if self.label_losses is None else by_row(self.label_losses, inputs["labels"])
        self.broken.look(loss, self.rows, self.label_losses, inputs["labels"])
        return self._logged(loss)

    def _logged(self, loss: Tensor) -> Tensor:
        """The loss for the log; the mean since its last line if it is not finite, as by `logging_nan_inf_filter`."""
        mean = self._tr_loss / (1 + self.state.global_step - self._globalstep_last_logged)
        return torch.where(loss.isfinite(), loss, mean.to(loss.dtype))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count tokens without padding on the device, until `_count_tokens`: the Trainer would wait for each count."""
        tokens = inputs["attention_mask"].sum()
        self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def _count_tokens(self) -> None:
        """Add the tokens since the last call to the state, those of all ranks."""
        if self._tokens is not None:
            self.state.num_input_tokens_seen += int(self.accelerator.gather(self._tokens).sum())
            self._tokens = None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """See `transformers.Trainer.log`."""
        self._count_tokens()
        super().log(logs, *args, **kwargs)

    def _label_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        losses_N = token_losses(outputs.logits, labels)
        if torch.is_grad_enabled() or self._evaluates:
            self.label_losses = losses_N.detach()
        return mean_loss(weighed(losses_N, labels, self._weights), num_items_in_batch)

    def _row_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if self._evaluates:  # held-out rows are measured as in other runs
            return self._label_loss(outputs, labels, num_items_in_batch)
        losses_B = row_losses(outputs.logits, labels)
        self._private_losses.append(losses_B.detach())
        return finite_sum(losses_B)

    def _private_step(self, model: nn.Module, inputs: dict[str, Any], privacy: DP) -> Tensor:
        """Forward and backward passes of a step's rows, then noise."""
        self._private_losses = [torch.zeros(0, device=self.args.device)]
        for part in privacy.parts({name: value for name, value in inputs.items() if name != ROW}):
            super().training_step(model, part)
        privacy.release(self.state.global_step)  # before the Trainer clips, logs or applies the gradient
        losses = torch.cat(self._private_losses)
        finite = losses.isfinite()
        if not self._warned and not bool(finite.all()):
            self._warned = True
            logger.warning("a row has no finite loss: in a private run such rows have no effect")
        return losses.where(finite, 0.0).sum() / finite.sum().clamp(min=1)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, which `Sealing` completes before it deletes older ones."""
        self._count_tokens()
        if self.args.should_save:
            begin(checkpoint_of(self.args, self.state))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read the adapter's weights."""
        with read_of(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read the state; torch loads tensors and plain values only."""
        with read_of(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:  # a run may take more steps than before, and the saved rate is of the old number
            self.lr_scheduler.last_epoch -= 1
            self.lr_scheduler.step()

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Read the state of the gradient scaler."""
        with read_of(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Read the generators' state."""
        with read_of(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter and the tokenizer."""
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            write_adapter(self.model, folder, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _load_best_model(self) -> None:
        """Load the weights of the least held-out loss."""
        best = Path(self.state.best_model_checkpoint)
        if is_complete(best):
            self._load_from_checkpoint(str(best))
            self.kept_step = self.state.best_global_step
        else:
            logger.warning("the best checkpoint, %s, is not there: the last weights are kept", best)

    def take(self, checkpoint: Path, best: bool) -> None:
        """Load history and weights, or the `best` weights, of the last checkpoint of a run."""
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._load_from_checkpoint(str(checkpoint))
        if (beside := best_in(checkpoint.parent, checkpoint)) is not None:
            self.state.best_model_checkpoint = str(beside)  # the state has the path at the start of the run
        if best and self.state.best_model_checkpoint:
            self._load_best_model()

    def _refuse_own_loss(self, model: nn.Module) -> None:
        if self.privacy is not None:
            raise UnsupportedError(
                f"the loss of {type(model).__name__} is not a mean over label tokens, so rows may contribute to each "
                "other's: train another model, or without dp_epsilon"
            )
        if self._weights is not None:
            raise UnsupportedError(
                f"the loss of {type(model).__name__} is not a mean over label tokens, so rows cannot be weighted: "
                "train another model, or rows without the column 'weight'"
            )

    def _all_have_labels(self, labels: Tensor) -> bool:
        """Whether every rank has labels: all must compare, as weights may be gathered."""
        own = label_positions(labels).any().cpu().double()
        return float(mean_over_ranks(own, self.args.device)) == 1

    def _agrees(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether the loss over label positions is the model's own, up to rounding."""
        try:
            with evaluating(model), self.compute_loss_context_manager():
                ours, theirs = difference_from_model(model, self._prepare_inputs(inputs))
        except InputError as error:
            logger.warning("logits are computed at all positions, which costs time and memory: %s", error)
            return False
        agrees = losses_agree(model, ours, theirs)
        if not agrees:
            logger.warning(
                "logits are computed at all positions, which costs time and memory: the model's own loss is %.5g, but "
                "the loss over label positions is %.5g",
                theirs,
                ours,
            )
        return agrees


def _fixed_row() -> dict[str, Tensor]:
    """A row of the first tokens, for a comparison that must not depend on private rows."""
    ids_1T = torch.arange(8)[None]
    return {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T), "labels": ids_1T}


class LayerTrainer(SiftTrainer):
    """SiftTrainer for tuned layers: its checkpoints hold these layers alone, and name the `base`."""

    def __init__(self, *args: Any, opened: OpenLayers, base: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._opened = opened
        self.about = About(base, opened.numbers)

    def save_layers(self, folder: Path) -> None:
        """Write the weights of the tuned layers in their current dtype."""
        save_tuned(folder, self.about, self._opened.parameters)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the weights of the tuned layers alone."""
        if self.args.should_save:
            self.save_layers(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read the weights of the tuned layers."""
        put_in(self.model, read_tuned(Path(resume_from_checkpoint)), resume_from_checkpoint)


def steps_per_epoch(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps of an epoch."""
    batches = math.ceil(rows / (arguments.train_batch_size * arguments.world_size))
    steps: int = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return steps


def planned_steps(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps of a run."""
    asked: int = arguments.max_steps
    return asked if asked > 0 else math.ceil(arguments.num_train_epochs * steps_per_epoch(arguments, rows))
