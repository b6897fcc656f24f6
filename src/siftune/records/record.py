"""Losses of training rows in any Trainer with any method: `RowRecord`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.base.errors import UnsupportedError
from siftune.engine.ranks import columns_of_ranks, world_size
from siftune.methods.host.callback import calling_trainer, resumed_from
from siftune.methods.host.row_numbers import RowNumbers, row_numbers
from siftune.models.loss import by_row, row_losses
from siftune.records.visits import NAME, NOTHING, Visits, read_visits, write_visits

logger = logging.getLogger(__name__)

_WAITING = 64  # batches whose losses wait on the accelerator: every copy to the host takes time


class RowRecord(TrainerCallback):  # type: ignore[misc]
    """Records the loss of every row at each visit, with any method and in any transformers Trainer.

    Losses come from the forward pass of training, which stays bit-identical. The file is written with every checkpoint
    and at the end, for all ranks; a resumed run continues it. `siftune.records.visits` lists its columns. Rows are
    identified by their numbers in the training set.

    Batches without one row per sample are refused: packed and padding-free batches, pairs, generated batches, data sets
    without an index. Losses are plain cross entropies, whatever else the Trainer minimises.

    Args:
        path: File to write; `rows.parquet` in the Trainer's output folder by default.
        places: Place of each row, such as "rows.jsonl:17", for the column `place`.
        about: Text stored with the rows, so that a reader can check that they have not changed.

    Raises:
        UnsupportedError: In training, if rows or losses of a batch cannot be determined.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[record := RowRecord()])
        >>> output = trainer.train()
        >>> record.path.name, len(record.visits()), float(record.visits().loss[0]) > 0
        ('rows.parquet', 24, True)
    """

    def __init__(self, path: str | Path | None = None, places: Sequence[str] = (), about: str = "") -> None:
        self.path = self._given = None if path is None else Path(path)
        self._places = places
        self._about = about
        self._trainer: Trainer | None = None
        self._numbers: RowNumbers | None = None
        self._handle: Any = None
        self._losses: list[Tensor] = []  # (2, B) of the batch at work, from the model's output, by pass
        self._waiting: list[tuple[int, Tensor, Tensor]] = []
        self._done: list[NDArray[np.float64]] = [NOTHING]

    def __repr__(self) -> str:
        return f"RowRecord({'' if self.path is None else repr(str(self.path))})"

    def visits(self, since: int = 0) -> Visits:
        """Visits from a step on, on this rank, including those before the run was resumed."""
        self._settle()
        table = self._done[0]
        return Visits.of(table[:, table[1] >= since])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the hooks, and continue the record of the checkpoint."""
        self.remove()
        self._trainer = trainer = calling_trainer(self)
        if trainer is None:
            raise UnsupportedError(
                "RowRecord is a callback of a transformers Trainer, and none has called it: pass it to one"
            )
        self.path = self._given or Path(args.output_dir) / NAME
        self._numbers = row_numbers(trainer)
        self._handle = kwargs["model"].register_forward_hook(self._look)
        self._waiting, self._done, self._losses = [], [self._resumed(state)], []

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Number the rows of the batches."""
        assert self._numbers is not None
        self._numbers.number(kwargs.get("train_dataloader"))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record a batch before the last of its step."""
        self._note(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the last batch of a step."""
        self._note(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the file, and a copy into the checkpoint."""
        self._write(args, Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the file, and remove the hooks."""
        self._write(args)
        self.remove()

    def leave(self) -> None:
        """Write the file and remove the hooks after an exception in training.

        On several ranks the others may be gone, so the file of the last checkpoint is kept.
        """
        try:
            if self._trainer is not None and world_size() == 1 and self._trainer.state.global_step:
                self._write(self._trainer.args)
        finally:
            self.remove()

    def remove(self) -> None:
        """Remove the hooks; needed only after an exception in training."""
        if self._handle is not None:
            self._handle.remove()
        if self._numbers is not None:
            self._numbers.release()
        self._handle = self._numbers = self._trainer = None

    def _resumed(self, state: TrainerState) -> NDArray[np.float64]:
        """The record of a checkpoint; the first rank holds that of all ranks."""
        folder = resumed_from(self)
        if not state.global_step or folder is None or not state.is_world_process_zero:
            return NOTHING
        if not (folder / NAME).is_file():
            logger.warning("%s has no %s: rows are recorded from step %d on", folder, NAME, state.global_step + 1)
            return NOTHING
        saved = read_visits(folder / NAME)
        if saved.about != self._about:
            logger.warning("%s is of other rows: they are recorded from step %d on", folder, state.global_step + 1)
            return NOTHING
        return saved.visits.table()

    def _look(self, _: Any, __: Any, output: Any) -> None:
        """Read the losses from the output of a training forward pass."""
        numbers = self._numbers
        if numbers is None or not numbers.at_work or numbers.labels is None or not torch.is_grad_enabled():
            return
        if hasattr(self._trainer, "label_losses") and _at_labels(output, numbers.labels):
            return  # siftune's own Trainer keeps them
        self._losses.append(row_losses(output, numbers.labels))

    def _note(self, step: int) -> None:
        """Keep the losses of a batch, on its device."""
        assert self._numbers is not None
        rows_B, labels_BT, losses = self._numbers.rows, self._numbers.labels, self._losses
        losses_N = getattr(self._trainer, "label_losses", None)
        if not losses and losses_N is not None and labels_BT is not None:
            losses = [by_row(losses_N, labels_BT)]
        if rows_B is None or [each.shape[1] for each in losses] != [len(rows_B)]:
            raise UnsupportedError(_why(rows_B, labels_BT, losses))
        self._waiting.append((step, rows_B, losses[0]))
        self._numbers.rows, self._losses = None, []
        if len(self._waiting) >= _WAITING:
            self._settle()

    def _settle(self) -> None:
        """Append the waiting batches to the table, (4, V)."""
        if self._waiting:
            steps, rows, losses = zip(*self._waiting, strict=True)
            counts = torch.tensor([len(each) for each in rows])
            step_V = torch.tensor(steps).repeat_interleave(counts)
            parts = [torch.cat(rows)[None], step_V[None], torch.cat(losses, 1).cpu()]
            self._done.append(torch.cat([part.double() for part in parts]).numpy())
        self._waiting, self._done = [], [np.concatenate(self._done, axis=1)]

    def _write(self, args: TrainingArguments, checkpoint: Path | None = None) -> None:
        self._settle()
        table = columns_of_ranks(torch.from_numpy(self._done[0]), args.device).numpy()
        if args.process_index:
            return
        assert self.path is not None
        for path in (self.path, *([checkpoint / NAME] if checkpoint is not None and checkpoint.is_dir() else [])):
            write_visits(path, Visits.of(table), self._places, self._about)


def _at_labels(output: Any, labels_BT: Tensor) -> bool:
    """Whether an output has logits at label positions alone; a row's first token never is one."""
    logits = getattr(output, "logits", None)
    return isinstance(logits, Tensor) and logits.shape[:2] != labels_BT.shape


def _why(rows_B: Tensor | None, labels_BT: Tensor | None, losses: Sequence[Tensor]) -> str:
    """Why a batch cannot be recorded."""
    if rows_B is None:
        return (
            "RowRecord cannot tell which rows are in a batch: the data set has no index, or the collator does not keep "
            "one row per sample, as with packing, padding_free, pairs or generated batches; turn that off, or leave "
            "RowRecord out"
        )
    if labels_BT is None:
        return "RowRecord needs the labels of a batch, and this Trainer's batches have none: leave it out"
    passes = f"in passes of {', '.join(str(each.shape[1]) for each in losses)} rows" if losses else "not at all"
    return (
        f"RowRecord needs one forward pass over the {len(rows_B)} rows of a batch, and the model was called {passes}: "
        "leave it out"
    )
