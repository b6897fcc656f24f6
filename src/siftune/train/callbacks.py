"""Callbacks of a training run: metrics, progress, regular checkpoints, early stopping."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from siftune.base.environment import peak_memory_mb
from siftune.base.words import counted
from siftune.engine.ranks import on_any_rank
from siftune.train.folder.run import RunFolder

logger = logging.getLogger(__name__)
_PARTS = 10  # of a run, after each of which it is saved
_LEAST = 10  # steps between two of these, so that short runs do not save more than they train
_SECONDS = 15 * 60  # after which a step is saved in any case
_KEPT = 2  # newest checkpoints, besides that of the least held-out loss


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Adds speed, memory and active layers to the Trainer's logs, and writes them to metrics.jsonl.

    It must stand before callbacks that read these figures from the logs. `active` tells how many layers train in the
    current step, `compiling` the seconds that compiling has taken so far, which the speed leaves out.
    """

    def __init__(self, folder: RunFolder, active: Callable[[], int], compiling: Callable[[], float] = float) -> None:
        self._folder = folder
        self._active = active
        self._compiling = compiling
        self._compiled = 0.0
        self._since = time.monotonic()
        self._tokens = 0
        self._steps = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._mark(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the last step logged, too: what a run came to is read from the log."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Extend and record a line of the log."""
        logs: dict[str, Any] = kwargs["logs"]
        steps = state.global_step - self._steps
        if "loss" in logs and steps > 0:
            compiled = self._compiling() - self._compiled
            elapsed = max(time.monotonic() - self._since - compiled, 1e-9)
            logs["tokens_per_second"] = round((state.num_input_tokens_seen - self._tokens) / elapsed, 1)
            logs["seconds_per_step"] = round(elapsed / steps, 4)
            logs["peak_memory_mb"] = round(peak_memory_mb(), 1)
            logs["active_layers"] = self._active()
            logs |= {"compile_seconds": round(compiled, 3)} if compiled else {}
            self._mark(state)
        logs.pop("train_tokens_per_second", None)  # the Trainer's, which takes evaluations for training time
        if state.is_world_process_zero:
            self._folder.append("metrics.jsonl", {"step": state.global_step, **logs})

    def _mark(self, state: TrainerState) -> None:
        self._since = time.monotonic()
        self._compiled = self._compiling()
        self._tokens = int(state.num_input_tokens_seen)
        self._steps = state.global_step


class ProgressView(TrainerCallback):  # type: ignore[misc]
    """A bar with figures on a terminal, a plain line per log elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._started = 0.0
        self._first_step = 0
        self._newest: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Show the bar."""
        self._started = time.monotonic()
        self._first_step = state.global_step
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        columns = (
            TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(), TextColumn("left"),
        )  # fmt: skip
        self._bar = Progress(*columns, console=self._console)
        self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step, figures="")
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Advance the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the newest figures."""
        logs: dict[str, Any] = kwargs["logs"]
        if not {"loss", "eval_loss"} & logs.keys() or not state.is_world_process_zero:
            return
        kind = "loss" if "loss" in logs else "eval_loss"
        self._newest[kind] = describe(logs) if kind == "loss" else f"held-out loss {float(logs[kind]):.4f}"
        if self._bar is not None:
            self._bar.update(self._task, figures="  ".join(self._newest.values()))
        else:
            left = f"  {self._seconds_left(state):.0f} s left" if kind == "loss" else ""
            self._console.print(f"step {state.global_step}/{state.max_steps}  {self._newest[kind]}{left}")

    def close(self) -> None:
        """Take the bar down, also where training ended in an exception."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the bar down."""
        self.close()

    def _seconds_left(self, state: TrainerState) -> float:
        done = max(1, state.global_step - self._first_step)
        left: int = state.max_steps - state.global_step
        return float((time.monotonic() - self._started) / done * left)


class StepsTold(TrainerCallback):  # type: ignore[misc]
    """Tells how many optimizer steps are done, and of how many, for displays of work that trains on its way."""

    def __init__(self, told: Callable[[int, int], None]) -> None:
        self._told = told

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Tell."""
        self._told(state.global_step, state.max_steps)


def describe(logs: dict[str, Any]) -> str:
    """The figures of a log in one line."""
    parts = [f"loss {float(logs['loss']):.4f}"]
    if "tokens_per_second" in logs:
        parts += [
            f"{logs['tokens_per_second']:,.0f} tokens/s",
            f"peak {logs['peak_memory_mb']:,.0f} MB",
            f"{counted(logs['active_layers'], 'layer')} active",
        ]
    if "compile_seconds" in logs:
        parts.append(f"{logs['compile_seconds']:,.0f} s compiling")
    return "  ".join(parts)


class RegularCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Has the Trainer save what a killed run goes on from, where a recipe does not say how often (ours).

    After every tenth of the run, after a quarter of an hour at the latest, at its end, and where an evaluation finds
    less loss than all before; kept are the last two, and that of the least loss.
    """

    def __init__(self) -> None:
        self._saved = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set how often, now that the Trainer knows its steps."""
        args.save_strategy, args.save_total_limit = SaveStrategy.STEPS, _KEPT
        state.save_steps = max(_LEAST, math.ceil(state.max_steps / _PARTS))
        self._saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save a step that comes late after the last one."""
        late = time.monotonic() - self._saved >= _SECONDS
        if on_any_rank(late, args.device):  # clocks differ, and ranks save together or not at all
            control.should_save = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save where the held-out loss is the least so far."""
        if evaluations_since_best(state) == 0:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note when it was."""
        self._saved = time.monotonic()


class EarlyStop(TrainerCallback):  # type: ignore[misc]
    """Stops training where evaluations find no less held-out loss any more, and has the best kept.

    Not transformers' own, whose count begins anew when a run goes on: this one counts in the Trainer's history, which
    stands in every checkpoint.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the Trainer put the best in the place of the last, and say where there are too few evaluations."""
        args.load_best_model_at_end = True
        by_steps = args.eval_strategy == IntervalStrategy.STEPS
        evaluations = math.ceil(state.max_steps / state.eval_steps) if by_steps else state.num_train_epochs
        if evaluations <= self._patience + 1:  # after the last nothing is left to stop
            logger.warning(
                "patience %d cannot stop this run, which has %s: the best is kept all the same; evaluate more often, "
                "with eval_every",
                self._patience,
                counted(evaluations, "evaluation"),
            )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save where the loss is the least so far, and where training stops."""
        since = evaluations_since_best(state)
        if since >= self._patience:
            control.should_training_stop = True
            if state.global_step < state.max_steps and state.is_world_process_zero:
                logger.info("stopped early, at step %d of %d: patience has run out", state.global_step, state.max_steps)
        control.should_save |= since == 0 or since >= self._patience


def evaluations_since_best(state: TrainerState) -> int:
    """Evaluations after the first one of least loss; 0 where the last is it, and before the first."""
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0
