"""Steps whose loss or gradient is not finite: left out, told with their rows, and the end of training where they go on.

Nothing of such a step reaches the weights, nor the optimizer's state, which would keep a NaN for good (ours).
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.base.errors import TrainingError
from siftune.base.numerics import all_finite
from siftune.engine.ranks import on_any_rank
from siftune.models.loss import label_positions

logger = logging.getLogger(__name__)

SKIPPED = "skipped_steps"  # in the log: how many so far; a run that goes on counts from its checkpoint's
BAD_STEPS = 3  # steps of a run that may be left out; one more ends it
_NAMED = 5  # rows that are told


class BrokenSteps(TrainerCallback):  # type: ignore[misc]
    """Leaves out at most so many steps that have a number that is not finite; the next one stops training.

    It must stand before callbacks that look at gradients.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.name: Callable[[int], str] = lambda row: f"row {row}"  # which row a number stands for
        self.log: Callable[[dict[str, float]], None] = lambda _: None  # the Trainer's
        self._rows: list[int] = []  # of this step
        self._suspects: list[int] = []  # those whose own loss is not finite
        self._loss: float | None = None
        self._skipped = False

    def look(self, loss: Tensor, rows: Sequence[int], losses_N: Tensor | None, labels: Tensor) -> None:
        """Note a batch of a step: its loss, numbers of its rows and losses of its labels where known, (B, T) labels."""
        self._rows += rows
        if bool(torch.isfinite(loss)):
            return
        self._loss = float(loss)
        if losses_N is not None and len(rows) == len(labels):
            row_N = label_positions(labels).nonzero()[:, 0]
            self._suspects += [rows[int(at)] for at in row_N[~torch.isfinite(losses_N).to(row_N.device)]]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at every gradient, and take them all away where a number is broken, so that the optimizer does nothing.

        Under fp16 the GradScaler looks at the gradients, and skips the step.
        """
        groups = kwargs["optimizer"].param_groups  # walking through all modules of the model would take longer
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        finite = args.fp16 or not parameters or all_finite([p.grad for p in parameters])
        if not on_any_rank(not finite or self._loss is not None, args.device):  # all leave a step out, or none
            self._forget()
            return
        step, what = state.global_step + 1, self._what()
        self._forget()
        done = skipped_steps(state)
        if done >= self._most:
            before = f" {done} such steps were left out before." if done else ""
            raise TrainingError(
                f"{what} at step {step}; nothing of this step reached the adapter.{before} Lower --lr, look for broken "
                "rows in the data, or train in --dtype float32."
            )
        logger.warning("%s at step %d, which is left out; %d more may be", what, step, self._most - done - 1)
        self._skipped = True
        if not args.fp16:
            for parameter in parameters:
                parameter.grad = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put a step that was left out into the log."""
        if self._skipped:
            self._skipped = False
            self.log({SKIPPED: skipped_steps(state) + 1})

    def _what(self) -> str:
        rows = list(dict.fromkeys(self._suspects or self._rows))
        more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
        names = ", ".join(map(self.name, rows[:_NAMED]))
        where = f" (rows: {names}{more})" if rows else ""
        return f"{'A gradient is not finite' if self._loss is None else f'The loss is {self._loss}'}{where}"

    def _forget(self) -> None:
        self._rows, self._suspects, self._loss = [], [], None


def skipped_steps(state: TrainerState) -> int:
    """Steps of a run that were left out so far, before it was resumed, too."""
    return sum(SKIPPED in entry for entry in state.log_history)


def refuse_broken_end(state: TrainerState) -> None:
    """Refuse what a run ended with where its last two steps were left out: their rows differ, so it is the weights.

    Raises:
        TrainingError: They were.
    """
    last = state.global_step
    if {last, last - 1} <= {entry.get("step") for entry in state.log_history if SKIPPED in entry}:
        raise TrainingError(
            f"The last steps, {last - 1} and {last}, were left out, for they had numbers that are not finite: the "
            "weights must be broken. Earlier checkpoints may be whole. Lower --lr, or train in --dtype float32."
        )
