"""How many steps a run has."""

import math

from transformers import TrainingArguments

from siftune.base.words import counted


def steps_per_epoch(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps of an epoch of so many training rows."""
    batches = math.ceil(rows / (arguments.train_batch_size * arguments.world_size))
    steps: int = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return steps


def planned_steps(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps of a whole run on so many training rows."""
    asked: int = arguments.max_steps
    return asked if asked > 0 else math.ceil(arguments.num_train_epochs * steps_per_epoch(arguments, rows))


def steps_in_words(steps: int, per_step: int, rows: int) -> str:
    """Say how many optimizer steps a run has, of how many rows: all of them where there are fewer than a step takes.

    Example:
        >>> steps_in_words(20, 16, 300), steps_in_words(1, 16, 5)
        ('20 steps of 16 rows', '1 step of 5 rows, all there are')
    """
    told = f"{counted(steps, 'step')} of {counted(min(per_step, rows), 'row')}"
    return told if per_step <= rows else f"{told}, all there are"
