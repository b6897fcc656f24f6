"""What a user sees of a training run, and what its metrics file holds."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.base.environment import peak_memory_mb
from siftune.base.words import counted
from siftune.train.folder.run import RunFolder


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
