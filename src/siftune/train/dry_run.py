"""Dry runs: validate the data, preview the loss mask, estimate time and memory. Nothing is kept.

The estimate times a few of the run's own steps on the real model (ours). A step's time is nearly proportional to the
tokens of its batches with padding, so the run's time is the trial's times the ratio of tokens. Batches are drawn as in
the run. The trial begins with the batch that has the longest row, where memory peaks; that step also includes the cost
of the first one, and counts once. Methods that score every few steps are tried for that many steps, and methods that
keep their layers for some steps draw them in every step.
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from siftune.base.environment import peak_memory_mb
from siftune.base.errors import RecipeError
from siftune.base.stages import stages
from siftune.models.loss import IGNORED
from siftune.recipe.checks import check
from siftune.recipe.schema import Recipe, method_of, resolve_recipe, settings_of
from siftune.records.rows import read_rows
from siftune.train.build import NONE, Built, build, check_trackers, trainable
from siftune.train.folder.weights import adopted
from siftune.train.prepare import (
    Lengths,
    ModelSource,
    Prepared,
    Source,
    lengths_of,
    prepare,
    row_lengths,
    trained_and_held_out,
)
from siftune.train.trainer import planned_steps

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


@dataclass(frozen=True)
class Example:
    """A row as it is trained on."""

    place: str
    parts: list[tuple[str, bool]]  # its text in pieces, and whether each is learned


@dataclass(frozen=True)
class DryRun:
    """What a run would do and take."""

    recipe: Recipe  # its settings, resolved
    prepared: Prepared  # its rows, and what is wrong with others
    examples: list[Example]  # the first of its rows, one of middle length and the longest
    forecast: Forecast  # what trains, and what it takes

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        known, seen = self.forecast, self.forecast.lengths
        data = self.prepared.data
        return {
            "rows": len(data["train"]),
            "held_out": len(data["eval"]) if "eval" in data else 0,
            "held_out_trained_on": trained_and_held_out(self.prepared.rows),
            "bad_rows": list(self.prepared.bad),
            "cut": sum(self.prepared.cut.values()),
            "tokens": {"mean": round(seen.mean, 1), "learned": round(seen.learned, 1), "longest": seen.longest},
            "examples": [{"place": one.place, "parts": one.parts} for one in self.examples],
            "trainable": known.trainable,
            "parameters": known.parameters,
            "layers": known.layers,
            "steps": known.steps,
            "seconds": None if known.seconds is None else round(known.seconds, 1),
            "memory_mb": None if known.memory_mb is None else round(known.memory_mb, 1),
            "steps_tried": known.tried,
        }


def dry_run(recipe: Recipe, console: Console, source_of: Callable[[str], Source] = ModelSource) -> DryRun:
    """Do what `train` does before it trains, try a few steps, and leave nothing; arguments as for `train`.

    Raises:
        InputError: On anything in the recipe, the data or the model that cannot be used, but for bad rows, which are
            named, as long as there are others.
    """
    check(recipe)
    check_trackers(recipe.report_to)
    if recipe.resume:
        raise RecipeError("a dry run is of a run from its beginning: leave resume out")
    source = source_of(recipe.model)
    recipe = source.settle(resolve_recipe(adopted(recipe)))
    read = read_rows(recipe)
    model, tokenizer = source.load(recipe.dtype, recipe.quantize)
    with stages(console) as told:
        prepared = prepare(replace(recipe, bad_rows="drop"), tokenizer, read, told)
        told("trying some steps", 0, 0)
        found = forecast(recipe, model, tokenizer, prepared.data)
    return DryRun(recipe, prepared, examples(tokenizer, prepared), found)


def examples(tokenizer: PreTrainedTokenizerBase, prepared: Prepared) -> list[Example]:
    """The first of the training rows, one of middle length and the longest, as far as they are different ones."""
    data, rows = prepared.data["train"], prepared.rows["train"]
    order = np.argsort(row_lengths(data), kind="stable")
    numbers = dict.fromkeys((0, int(order[len(order) // 2]), int(order[-1])))
    return [Example(rows[number].origin, _parts(tokenizer, data, number)) for number in numbers]


def _parts(tokenizer: PreTrainedTokenizerBase, data: Dataset, number: int) -> list[tuple[str, bool]]:
    """A row's text, cut where learned and other tokens meet."""
    row = data[number]
    runs = groupby(zip(row["input_ids"], row["labels"], strict=True), lambda pair: pair[1] != IGNORED)
    return [(str(tokenizer.decode([token for token, _ in run])), learned) for learned, run in runs]
