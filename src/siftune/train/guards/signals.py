"""Ctrl-C and SIGTERM while a run trains: the step at work is finished and saved, and training ends (ours)."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.engine.ranks import on_any_rank

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts(TrainerCallback):  # type: ignore[misc]
    """Ends training after the step in which a signal came to any rank, with a checkpoint; a second one at once."""

    def __init__(self) -> None:
        self.came = False  # whether training was ended
        self._asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while the block runs; outside of the main thread nobody can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # else it is not for us
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, where a signal came to any rank."""
        if on_any_rank(self._asked, args.device) and state.global_step < state.max_steps:
            self.came = True
            args.load_best_model_at_end = False  # the adapter of this step is left, not that of the best
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have nothing evaluated that the run would not have evaluated here: its epoch has not ended."""
        if self.came and not float(state.epoch or 0).is_integer():
            control.should_evaluate = control.should_log = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        logger.warning("interrupted: the step at work is finished and saved first; another Ctrl-C ends it at once")
