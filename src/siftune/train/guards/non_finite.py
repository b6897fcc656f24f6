"""Non-finite losses and gradients: skip the step and report its rows; stop training if they persist (ours).

Nothing of such a step reaches the weights or the optimizer's state, which would keep a NaN forever. Private runs do not
use this guard: the steps that it skips depend on single rows. See `methods.dp`.
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

SKIPPED = "skipped_steps"  # in the log: skipped steps so far; a resumed run continues the count of its checkpoint
BAD_STEPS = 3  # steps that a run may skip; one more stops it
_NAMED = 5  # rows in a message


class BrokenSteps(TrainerCallback):  # type: ignore[misc]
    """Skips non-finite steps, and stops training after `most` of them.

    It must precede callbacks that read gradients.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.name: Callable[[int], str] = lambda row: f"row {row}"  # name of a row by its number
        self.log: Callable[[dict[str, float]], None] = lambda _: None  # the Trainer's
        self._rows: list[int] = []  # of this step
        self._suspects: list[int] = []  # rows with a non-finite loss
        self._loss: float | None = None
        self._skipped = False

    def look(self, loss: Tensor, rows: Sequence[int], losses_N: Tensor | None, labels: Tensor) -> None:
        """Check a batch: its loss, the numbers of its rows, the (N,) losses of its label tokens, and (B, T) labels."""
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
        """Check every gradient, and remove all of them in a non-finite step, so that the optimizer does nothing.

        Under fp16 the GradScaler checks gradients and skips the step.
        """
        groups = kwargs["optimizer"].param_groups  # faster than all modules of the model
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        finite = args.fp16 or not parameters or all_finite([p.grad for p in parameters])
        if not on_any_rank(not finite or self._loss is not None, args.device):  # all ranks skip a step, or none
            self._forget()
            return
        step, what = state.global_step + 1, self._what()
        self._forget()
        done = skipped_steps(state)
        if done >= self._most:
            before = f" {done} such steps were skipped before." if done else ""
            raise TrainingError(
                f"{what} at step {step}; nothing of this step reached the adapter.{before} Lower --lr, look for broken "
                "rows in the data, or use --dtype float32."
            )
        logger.warning("%s at step %d, which is skipped; %d more may be skipped", what, step, self._most - done - 1)
        self._skipped = True
        if not args.fp16:
            for parameter in parameters:
                parameter.grad = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log a skipped step."""
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
    """Skipped steps of a run so far, including those before it was resumed."""
    return sum(SKIPPED in entry for entry in state.log_history)


def refuse_broken_end(state: TrainerState) -> None:
    """Refuse the weights of a run that skipped its last two steps: as their rows differ, the weights are broken.

    Raises:
        TrainingError: Both were skipped.
    """
    last = state.global_step
    if {last, last - 1} <= {entry.get("step") for entry in state.log_history if SKIPPED in entry}:
        raise TrainingError(
            f"The last steps, {last - 1} and {last}, were skipped as not finite: the weights are broken. Earlier "
            "checkpoints may be intact. Lower --lr, or use --dtype float32."
        )
