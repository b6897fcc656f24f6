"""Ctrl-C and SIGTERM during training: finish and save the current step, then stop (ours)."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.train.guards.flags import Flag

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_back() -> Iterator[list[int]]:
    """Hold back the first signal while the block runs, so that results are written to their end.

    torchrun ends the other ranks as soon as one has ended. A second signal interrupts the block.

    Yields:
        A list, to which the number of the signal is added.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        logger.warning("interrupted: results are written first; press Ctrl-C again to stop at once")

    with _handled_by(note):
        yield came


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals while the block runs; impossible outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # an ignored signal stays ignored
    handled = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, original in before.items():
            signal.signal(number, original)


class Interrupts(TrainerCallback):  # type: ignore[misc]
    """Stops training after the step in which a signal reaches any rank, with a checkpoint; a second signal at once."""

    def __init__(self) -> None:
        self.came = False  # whether training was stopped
        self._asked = False
        self.flag = Flag(lambda: self._asked)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals while the block runs; impossible outside the main thread."""
        with _handled_by(self._note):
            yield

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop if a signal reached any rank."""
        if self.flag and state.global_step < state.max_steps:
            self.came = True
            args.load_best_model_at_end = False  # keep the weights of this step, not the best
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Skip the evaluation of an epoch that has not ended."""
        if self.came and not float(state.epoch or 0).is_integer():
            control.should_evaluate = control.should_log = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        logger.warning("interrupted: the current step is finished and saved first; press Ctrl-C again to stop at once")
