"""What a method has to tell, in the log lines of the Trainer that calls it, so that every tracker gets it.

Trackers stand before a user's callbacks, and read a line before these see it. So what extends a line stands before all
others while training lasts.
"""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Means:
    """Means of some figures between two log lines.

    Example:
        >>> means = Means()
        >>> means.note({"layers": 2.0})
        >>> means.note({"layers": 3.0})
        >>> means.take(), means.take()
        ({'layers': 2.5}, {})
    """

    def __init__(self) -> None:
        self._noted: dict[str, list[float]] = {}

    def note(self, figures: Mapping[str, float]) -> None:
        """Take in the figures of a step or batch."""
        for name, value in figures.items():
            self._noted.setdefault(name, []).append(value)

    def take(self) -> dict[str, float]:
        """The means since the last time; what was not noted since is left out."""
        means = {name: sum(values) / len(values) for name, values in self._noted.items()}
        self._noted.clear()
        return means


class LogLines(TrainerCallback):  # type: ignore[misc]
    """Adds figures, those since it last asked, to a Trainer's lines on training, under a group: `gast/followed`."""

    def __init__(self, group: str, figures: Callable[[], Mapping[str, float]]) -> None:
        self._group = group
        self._figures = figures
        self._trainer: Trainer | None = None

    def begin(self, trainer: Trainer | None) -> None:
        """Stand before the Trainer's other callbacks from now on; None: nothing is logged."""
        self.remove()
        self._trainer = trainer
        if trainer is not None:
            stand_first(trainer, self)

    def remove(self) -> None:
        """Leave the Trainer; calling it twice does no harm."""
        if self._trainer is not None:
            _set_callbacks(self._trainer, [one for one in self._trainer.callback_handler.callbacks if one is not self])
            self._trainer = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Extend a line, and its copy in the Trainer's history."""
        logs: dict[str, Any] = kwargs["logs"]
        if "loss" not in logs:
            return
        figures = {f"{self._group}/{name}": float(f"{value:.6g}") for name, value in self._figures().items()}
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)


def stand_first(trainer: Trainer, callback: TrainerCallback) -> None:
    """Have a Trainer call a callback before all others, whether or not it has it already."""
    others = [one for one in trainer.callback_handler.callbacks if one is not callback]
    _set_callbacks(trainer, [callback, *others])


def _set_callbacks(trainer: Trainer, callbacks: list[TrainerCallback]) -> None:
    """Give a Trainer another list: it may be walking through the old one."""
    trainer.callback_handler.callbacks = callbacks
