"""How many steps a run has."""

import math

from transformers import TrainingArguments


def steps_per_epoch(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps of an epoch of so many training rows."""
    batches = math.ceil(rows / (arguments.train_batch_size * arguments.world_size))
    steps: int = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return steps


def planned_steps(arguments: TrainingArguments, rows: int) -> int:
    """Optimizer steps of a whole run on so many training rows."""
    asked: int = arguments.max_steps
    return asked if asked > 0 else math.ceil(arguments.num_train_epochs * steps_per_epoch(arguments, rows))
