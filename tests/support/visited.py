"""The rows that siftune's Trainer trains on."""

from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

from siftune.train.trainer import SiftTrainer


class Visit(NamedTuple):
    step: int  # optimizer steps before
    row: int
    place: str


@contextmanager
def visits():
    """A list of the visits of rows by all trainings within the block."""
    every, step_of = [], SiftTrainer.training_step

    def noted(trainer, *args, **kwargs):
        loss = step_of(trainer, *args, **kwargs)
        step = trainer.state.global_step
        every.extend(Visit(step, row, trainer.broken.name(row)) for row in trainer.rows)
        return loss

    with patch.object(SiftTrainer, "training_step", noted):
        yield every
