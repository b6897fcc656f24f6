"""Non-finite losses and gradients: skip the step and report its rows; stop training if they persist (ours).

Nothing of such a step reaches the weights or the optimizer's state, which would keep a NaN forever. Private runs do not
use this guard: the steps that it skips depend on single rows. See `methods.dp`.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.base.errors import TrainingError
from siftune.base.numerics import side_by_side
from siftune.methods.host.callback import calling_trainer
from siftune.models.loss import label_positions
from siftune.train.guards.flags import Flag, exchange

logger = logging.getLogger(__name__)

SKIPPED = "skipped_steps"  # in the log: skipped steps so far; a resumed run continues the count of its checkpoint
BAD_STEPS = 3  # steps that a run may skip; one more stops it
_NAMED = 5  # rows in a message


class BrokenSteps(TrainerCallback):  # type: ignore[misc]
    """Skips non-finite steps, and stops training after `most` of them.

    It must precede callbacks that read gradients.

    Args:
        most: Steps to skip before training stops.
        name: Returns the name of a row by its number.
        flags: Conditions of other callbacks, which ranks exchange with this one.
    """

    def __init__(
        self, most: int = BAD_STEPS, name: Callable[[int], str] = "row {}".format, flags: Sequence[Flag] = ()
    ) -> None:
        self._most = most
        self.name = name
        self._finite = True
        self._broken = Flag(lambda: not self._finite)
        self._flags = [self._broken, *flags]
        self._batches: list[_Batch] = []  # of this step
        self._skipped = False

    def look(self, loss: Tensor, rows: Sequence[int], losses_N: Tensor | None, labels: Tensor) -> None:
        """Check a batch: its loss, the numbers of its rows, the (N,) losses of its label tokens, and (B, T) labels."""
        self._batches.append(_Batch(loss.detach(), rows, losses_N, labels))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check every gradient, and remove all of them in a non-finite step, so that the optimizer does nothing.

        Under fp16 the GradScaler checks gradients and skips the step.
        """
        groups = kwargs["optimizer"].param_groups  # faster than all modules of the model
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        norms = [] if args.fp16 or not parameters else torch._foreach_norm([p.grad for p in parameters])
        numbers = [*(batch.loss for batch in self._batches), *norms]
        self._finite = not numbers or bool(side_by_side(numbers).isfinite().all())  # the host waits once
        batches, self._batches = self._batches, []
        exchange(self._flags, args.device)
        if not self._broken:  # all ranks skip a step, or none
            return
        step, what = state.global_step + 1, self._what(batches)
        done = skipped_steps(state)
        if done >= self._most:
            before = f", and {done} such steps were skipped before" if done else ""
            raise TrainingError(
                f"{what} at step {step}; nothing of this step reached the adapter{before}: lower --lr, look for broken "
                "rows in the data, or use --dtype float32"
            )
        logger.warning("%s at step %d, which is skipped; %d more may be skipped", what, step, self._most - done - 1)
        self._skipped = True
        if not args.fp16:
            for parameter in parameters:
                parameter.grad = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log a skipped step."""
        trainer = calling_trainer(self) if self._skipped else None
        self._skipped = False
        if trainer is not None:
            trainer.log({SKIPPED: skipped_steps(state) + 1})

    def _what(self, batches: "Sequence[_Batch]") -> str:
        losses = [loss for batch in batches if not math.isfinite(loss := float(batch.loss))]
        suspects = [row for batch in batches for row in batch.suspects()]
        rows = list(dict.fromkeys(suspects or [row for batch in batches for row in batch.rows]))
        more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
        names = ", ".join(map(self.name, rows[:_NAMED]))
        where = f" (rows: {names}{more})" if rows else ""
        return f"{f'the loss is {losses[-1]}' if losses else 'a gradient is not finite'}{where}"


class _Batch(NamedTuple):
    loss: Tensor
    rows: Sequence[int]  # their numbers
    losses_N: Tensor | None  # of the label tokens
    labels: Tensor

    def suspects(self) -> list[int]:
        """Rows with a non-finite loss."""
        if self.losses_N is None or len(self.rows) != len(self.labels) or math.isfinite(float(self.loss)):
            return []
        row_N = label_positions(self.labels).nonzero()[:, 0]
        return [self.rows[int(at)] for at in row_N[~torch.isfinite(self.losses_N).to(row_N.device)]]


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
            f"the last steps, {last - 1} and {last}, were skipped as not finite, so that the weights are broken: lower "
            "--lr, or use --dtype float32; earlier checkpoints may be intact"
        )
