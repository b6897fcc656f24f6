"""What a run will take, before it: a few of its own steps on the real model, timed, and nothing kept (ours).

A step's time is nearly in proportion to the tokens of its batches with their padding, so the run's time is that of the
trial times the ratio of tokens. Batches are drawn as the run draws them. The trial begins with the batch that has the
longest row, where memory peaks; that step also pays for what the first one costs, and counts once. Methods that score
in every so many steps are tried for as many, and those that hold their layers draw anew in every step.
"""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from siftune.base.environment import peak_memory_mb
from siftune.recipe.schema import Recipe, method_of, settings_of
from siftune.train.before import Lengths, lengths_of, row_lengths, trainable
from siftune.train.build import Built, build
from siftune.train.plan import planned_steps
from siftune.train.trackers import NONE

_LEAST, _MOST = 6, 24  # steps that are timed
_MEASURED = 4  # held-out batches that are timed

Numbers = npt.NDArray[np.int32]
Batches = list[list[int]]  # numbers of the rows in each


@dataclass(frozen=True)
class Forecast:
    """What a run will take."""

    trainable: int  # parameters that train
    parameters: int  # all of them
    layers: int  # layers that have something to train
    steps: int
    lengths: Lengths
    seconds: float | None = None  # time of training, with evaluations and checkpoints; None where it was not tried
    memory_mb: float | None = None  # peak memory in 10^6 bytes; None where it was not tried
    tried: int = 0  # steps that were timed


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when training began and when each of its steps ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._note()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._note()

    def _note(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def forecast(
    recipe: Recipe, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Mapping[str, Dataset]
) -> Forecast:
    """Try a few steps of a run; of a private one none, whose steps draw rows by chance. Arguments are those of `build`.

    The adapter is put on the model, and its values are of no use afterwards.

    Raises:
        InputError: As `build`; what a run would be refused for is refused here.
    """
    tries = _tries(recipe)
    batches = _batches(recipe, row_lengths(data["train"]))
    tried = _tried_batches(batches, row_lengths(data["train"]), recipe.accumulate, tries)
    with tempfile.TemporaryDirectory() as folder:
        clock = _Clock()
        short = replace(_hurried(recipe), save_every=tries + 1, eval_every=None, report_to=(NONE,), compile=False)
        if recipe.dp_epsilon is None:  # else noise is looked for that covers all steps
            short = replace(short, steps=tries + 1)
        rows = data["train"] if recipe.dp_epsilon else data["train"].select([row for batch in tried for row in batch])
        built = build(short, model, tokenizer, {**data, "train": rows}, Path(folder), [clock])
        try:
            known = _known(recipe, built, data)
            if recipe.dp_epsilon is not None:
                return known
            return _timed(recipe, built, clock, known, _Work(batches, tried, data))
        finally:
            built.release()


@dataclass(frozen=True)
class _Work:
    """Batches of an epoch, those of the trial, and the rows."""

    epoch: Batches
    tried: Batches
    data: Mapping[str, Dataset]

    def cost(self, batches: Batches) -> int:
        return _cost(batches, row_lengths(self.data["train"]))


def _known(recipe: Recipe, built: Built, data: Mapping[str, Dataset]) -> Forecast:
    """What is known without a trial."""
    arguments = built.trainer.args
    if recipe.dp_epsilon is None:  # a private run's Trainer has them
        arguments.max_steps = recipe.steps or -1
    steps = planned_steps(arguments, len(data["train"]))
    return Forecast(*trainable(built), built.depth, steps, lengths_of(data["train"]))


def _timed(recipe: Recipe, built: Built, clock: _Clock, known: Forecast, work: _Work) -> Forecast:
    """Train the steps of the trial, and reckon."""
    trainer, tries = built.trainer, len(work.tried) // recipe.accumulate - 1
    trainer.args.max_steps, trainer.args.train_sampling_strategy = tries + 1, "sequential"
    trainer.args.eval_strategy = "no"
    trainer.train()
    saving = time.perf_counter() - clock.times[-1]  # one checkpoint
    first, *others = (after - before for before, after in pairwise(clock.times))
    head, rest = work.tried[: recipe.accumulate], work.tried[recipe.accumulate :]
    rate = sum(others) / work.cost(rest)
    per_step = rate * work.cost(work.epoch) / len(work.epoch) * recipe.accumulate
    once = max(0.0, first - rate * work.cost(head))
    measuring = _evaluations(recipe, known.steps, len(work.epoch)) * _evaluation(built, work.data)
    seconds = known.steps * per_step + once + measuring + _saves(recipe, known.steps) * saving
    return replace(known, seconds=seconds, memory_mb=peak_memory_mb(), tried=tries)


def _tries(recipe: Recipe) -> int:
    """Steps to time: all that happens in every so many steps happens in them as often as in the run."""
    parts = zip(method_of(recipe).parts, settings_of(recipe), strict=True)
    periods = [(part.suppresses and getattr(s, "interval", 1)) or getattr(s, "support_every", 1) for part, s in parts]
    period = math.lcm(*periods)
    return min(_MOST, period * math.ceil(_LEAST / period))


def _hurried(recipe: Recipe) -> Recipe:
    """A recipe whose method draws layers in every step: those of one step say little of the others."""
    held: dict[str, Any] = {}
    for part, settings in zip(method_of(recipe).parts, settings_of(recipe), strict=True):
        if hasattr(settings, "interval") and not part.suppresses:
            held[settings.group] = replace(settings, **{"interval": 1})
    return replace(recipe, **held)


def _batches(recipe: Recipe, lengths: Numbers) -> Batches:
    """Batches of an epoch, drawn as the run draws them."""
    size, generator = recipe.batch_size, torch.Generator().manual_seed(recipe.seed)
    if recipe.group_by_length:
        order = get_length_grouped_indices(lengths.tolist(), size * recipe.accumulate, generator=generator)
    else:
        order = torch.randperm(len(lengths), generator=generator).tolist()
    return [order[start : start + size] for start in range(0, len(order), size)]


def _tried_batches(batches: Batches, lengths: Numbers, accumulate: int, tries: int) -> Batches:
    """Batches of the trial: the one with the longest row, and then as many of the others as the steps take."""
    longest = max(range(len(batches)), key=lambda number: _cost([batches[number]], lengths))
    whole = [batch for batch in batches if len(batch) == len(batches[0])]  # a last one may be smaller
    count = (tries + 1) * accumulate
    order = [batches[longest], *(whole * math.ceil(count / len(whole)))]
    return order[:count]


def _cost(batches: Batches, lengths: Numbers) -> int:
    """Tokens of batches, with their padding."""
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


def _evaluations(recipe: Recipe, steps: int, batches: int) -> float:
    """How often a run measures its held-out rows."""
    every = recipe.eval_every or max(1, math.ceil(batches / recipe.accumulate))
    return steps // every


def _saves(recipe: Recipe, steps: int) -> int:
    """How often a run saves a checkpoint, at the least."""
    return steps // recipe.save_every if recipe.save_every else math.ceil(steps / max(10, math.ceil(steps / 10)))


def _evaluation(built: Built, data: Mapping[str, Dataset]) -> float:
    """Seconds of measuring the held-out rows, from a few batches of them."""
    if "eval" not in data:
        return 0.0
    size, lengths = built.trainer.args.eval_batch_size, row_lengths(data["eval"])
    batches = [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]
    some: Sequence[int] = [row for batch in batches[:: max(1, len(batches) // _MEASURED)][:_MEASURED] for row in batch]
    started = time.perf_counter()
    built.trainer.evaluate(data["eval"].select(some))
    seconds = time.perf_counter() - started
    chunks = [list(some[start : start + size]) for start in range(0, len(some), size)]
    return seconds * _cost(batches, lengths) / _cost(chunks, lengths)
