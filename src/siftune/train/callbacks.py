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
from siftune.base.stages import BETWEEN
from siftune.base.text import counted, duration
from siftune.train.folder.run_folder import RunFolder
from siftune.train.guards.flags import Flag

logger = logging.getLogger(__name__)
_PARTS = 10  # of a run, with a checkpoint after each
_LEAST = 10  # steps between two of these checkpoints: short runs train longer than they save
_SECONDS = 15 * 60  # between two checkpoints at most
_KEPT = 2  # newest checkpoints, besides the one of the least held-out loss


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Adds speed, memory and active layers to the Trainer's logs, and writes them to metrics.jsonl.

    It must precede callbacks that read these values from the logs.

    Args:
        folder: The run folder.
        active: Returns the number of layers that train in the current step.
        compiling: Returns the seconds spent on compilation so far.

    Speed is that of steps alone, without compilation, evaluations and checkpoints. A start's first line has none.
    """

    def __init__(self, folder: RunFolder, active: Callable[[], int], compiling: Callable[[], float] = float) -> None:
        self._folder = folder
        self._active = active
        self._compiling = compiling
        self._compiled = 0.0
        self._since: float | None = None  # None before the first line: the Trainer counts tokens with each line
        self._seconds = 0.0
        self._tokens = 0
        self._steps = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the step's time, and log the last step too: the summary reads the log."""
        if self._since is not None:
            now = self._clock()
            self._seconds, self._since = self._seconds + now - self._since, now
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Leave out the time of the evaluation."""
        self._since = None if self._since is None else self._clock()

    def on_save(self, *_: Any, **__: Any) -> None:
        """Leave out the time of the checkpoint."""
        self.on_evaluate()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Extend and record a line of the log."""
        logs: dict[str, Any] = kwargs["logs"]
        if "loss" in logs:
            if self._seconds > 0:
                logs["tokens_per_second"] = round((state.num_input_tokens_seen - self._tokens) / self._seconds, 1)
                logs["seconds_per_step"] = round(self._seconds / (state.global_step - self._steps), 4)
            logs["peak_memory_mb"] = round(peak_memory_mb(), 1)
            logs["active_layers"] = self._active()
            compiled = self._compiling()
            logs |= {"compile_seconds": round(compiled - self._compiled, 3)} if compiled > self._compiled else {}
            self._seconds, self._compiled = 0.0, compiled
            self._since = self._clock() if self._since is None else self._since
            self._tokens, self._steps = int(state.num_input_tokens_seen), state.global_step
        logs.pop("train_tokens_per_second", None)  # the Trainer's, which includes evaluations
        if state.is_world_process_zero:
            self._folder.append("metrics.jsonl", {"step": state.global_step, **logs})

    def _clock(self) -> float:
        """Seconds without those of compilation."""
        return time.monotonic() - self._compiling()


class ProgressView(TrainerCallback):  # type: ignore[misc]
    """A progress bar on a terminal, a plain line for each log elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._started: float | None = None  # the end of the first step: a start says little about the others
        self._first_step = 0
        self._newest: dict[str, str] = {}
        self._shown = 0.0  # time of the newest line

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Show the bar."""
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        columns = (
            TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(), TextColumn("left"),
        )  # fmt: skip
        self._bar = Progress(*columns, console=self._console)
        self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step, figures="")
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar, or show a line every ten seconds, and as soon as the time left is known to be longer."""
        now = time.monotonic()
        if self._started is None:
            self._started = self._shown = now
            self._first_step = state.global_step
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)
            return
        left = self._seconds_left(state)
        first_estimate = state.global_step == self._first_step + 1 and left is not None and left >= BETWEEN
        due = first_estimate or now - self._shown >= BETWEEN
        if due and state.is_world_process_zero and not control.should_log:
            self._line(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the newest values."""
        logs: dict[str, Any] = kwargs["logs"]
        if not {"loss", "eval_loss"} & logs.keys() or not state.is_world_process_zero:
            return
        kind = "loss" if "loss" in logs else "eval_loss"
        self._newest[kind] = describe(logs) if kind == "loss" else _held_out(logs)
        if self._bar is not None:
            self._bar.update(self._task, figures="  ".join(self._newest.values()))
        else:
            self._line(state, self._newest[kind], with_time=kind == "loss")

    def _line(self, state: TrainerState, *figures: str, with_time: bool = True) -> None:
        """Print a step with its figures."""
        left = self._seconds_left(state) if with_time else None
        times = [] if left is None else [f"{duration(left)} left"]
        self._console.print("  ".join([f"step {state.global_step}/{state.max_steps}", *figures, *times]), markup=False)
        self._shown = time.monotonic()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Remove the bar."""
        self.close()

    def _seconds_left(self, state: TrainerState) -> float | None:
        done = state.global_step - self._first_step
        if self._started is None or done < 1:
            return None
        left: float = (time.monotonic() - self._started) / done * (state.max_steps - state.global_step)
        return left


class StepProgress(TrainerCallback):  # type: ignore[misc]
    """Reports optimizer steps, those done and all, for progress bars of work that includes training."""

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self._report = report

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Report a step."""
        self._report(state.global_step, state.max_steps)


def describe(logs: dict[str, Any]) -> str:
    """A log as one line of text."""
    parts = [f"loss {float(logs['loss']):.4f}"]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if "peak_memory_mb" in logs:
        parts += [f"peak {logs['peak_memory_mb']:,.0f} MB", f"{counted(logs['active_layers'], 'layer')} active"]
    if "compile_seconds" in logs:
        parts.append(f"{logs['compile_seconds']:,.0f} s compiling")
    return "  ".join(parts)


def _held_out(logs: dict[str, Any]) -> str:
    """The held-out loss as text, with that of each source."""
    sources = [f"{key.removeprefix(_SOURCE)} {value:.4f}" for key, value in logs.items() if key.startswith(_SOURCE)]
    return f"held-out loss {float(logs['eval_loss']):.4f}" + (f" ({', '.join(sources)})" if sources else "")


_SOURCE = "eval_loss/"  # before the source in a key of the log


class RegularCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Saves checkpoints of a recipe without `save_every` (ours).

    After every tenth of the run, after 15 minutes at most, at its end, and after an evaluation with the least held-out
    loss so far. The last two and the best are kept.
    """

    def __init__(self) -> None:
        self._saved = 0.0
        self.flag = Flag(lambda: time.monotonic() - self._saved >= _SECONDS)  # clocks differ, and ranks save together

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the interval, now that the number of steps is known."""
        args.save_strategy, args.save_total_limit = SaveStrategy.STEPS, _KEPT
        state.save_steps = max(_LEAST, math.ceil(state.max_steps / _PARTS))
        self._saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save a step long after the last checkpoint."""
        if self.flag:
            control.should_save = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save if the held-out loss is the least so far."""
        if evaluations_since_best(state) == 0:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the time."""
        self._saved = time.monotonic()


class EarlyStop(TrainerCallback):  # type: ignore[misc]
    """Stops training if `patience` evaluations in a row do not improve, and keeps the best weights.

    transformers' own callback starts to count again in a resumed run. This one counts in the Trainer's history, which
    is part of every checkpoint.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the Trainer load the best weights at the end, and warn if there are too few evaluations."""
        args.load_best_model_at_end = True
        by_steps = args.eval_strategy == IntervalStrategy.STEPS
        evaluations = math.ceil(state.max_steps / state.eval_steps) if by_steps else state.num_train_epochs
        if evaluations <= self._patience + 1:  # after the last nothing is left to stop
            logger.warning(
                "patience %d cannot stop this run, which has %s; the best weights are kept anyway: evaluate more often "
                "with eval_every",
                self._patience,
                counted(evaluations, "evaluation"),
            )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save if the loss is the least so far, and when training stops."""
        since = evaluations_since_best(state)
        if since >= self._patience:
            control.should_training_stop = True
            if state.global_step < state.max_steps and state.is_world_process_zero:
                logger.info("stopped early, at step %d of %d: no improvement", state.global_step, state.max_steps)
        control.should_save |= since == 0 or since >= self._patience


def evaluations_since_best(state: TrainerState) -> int:
    """Number of evaluations after the first one of least loss; 0 before the first. NaN counts as infinite."""
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    losses = [math.inf if math.isnan(loss) else loss for loss in losses]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0
