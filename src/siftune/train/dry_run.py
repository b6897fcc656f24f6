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
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from rich.console import Console
from transformers import TrainerCallback
from transformers.trainer_pt_utils import get_length_grouped_indices

from siftune.base.environment import peak_memory_mb, synchronize
from siftune.base.errors import RecipeError
from siftune.base.stages import stages
from siftune.models.loss import IGNORED
from siftune.recipe.checks import NO_TRACKER
from siftune.recipe.schema import Recipe, method_of, settings_of
from siftune.train.build import Built, build, trainable
from siftune.train.prepare import Lengths, Prepared, lengths_of, row_lengths, trained_and_held_out
from siftune.train.session import Session, open_session, read_session, settled
from siftune.train.source import ModelSource, Source
from siftune.train.trainer import planned_steps

_LEAST, _MOST = 6, 24  # steps to time
_EVALUATED = 4  # held-out batches to time

Numbers = npt.NDArray[np.int32]
Batches = list[list[int]]  # numbers of the rows in each


@dataclass(frozen=True)
class Estimate:
    """Size, time and memory of a run."""

    trainable: int  # parameters
    parameters: int
    layers: int  # layers with trainable parameters
    steps: int
    lengths: Lengths
    seconds: float | None = None  # of training, evaluations and checkpoints; None for a private run
    uncertainty: float | None = None  # two standard errors of `seconds`, as a share of it, by the spread of timed steps
    memory_mb: float | None = None  # peak, in 10^6 bytes; None for a private run
    tried: int = 0  # timed steps


@dataclass(frozen=True)
class Example:
    """A row as the model sees it."""

    place: str
    parts: list[tuple[str, bool]]  # pieces of its text, and whether they are labels


@dataclass(frozen=True)
class DryRun:
    """Result of a dry run."""

    recipe: Recipe  # resolved
    prepared: Prepared
    examples: list[Example]  # the first training row, one of median length and the longest
    estimate: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types."""
        known, lengths, data = self.estimate, self.estimate.lengths, self.prepared.data
        return {
            "rows": len(data["train"]),
            "held_out": len(data["eval"]) if "eval" in data else 0,
            "held_out_trained_on": trained_and_held_out(self.prepared.rows),
            "bad_rows": list(self.prepared.bad),
            "cut": sum(self.prepared.cut.values()),
            "tokens": {
                "mean": round(lengths.mean, 1),
                "labels": round(lengths.labels, 1),
                "longest": lengths.longest,
            },
            "examples": [{"place": one.place, "parts": one.parts} for one in self.examples],
            "trainable": known.trainable,
            "parameters": known.parameters,
            "layers": known.layers,
            "steps": known.steps,
            "seconds": known.seconds and round(known.seconds, 1),
            "uncertainty": known.uncertainty and round(known.uncertainty, 3),
            "memory_mb": known.memory_mb and round(known.memory_mb, 1),
            "steps_tried": known.tried,
        }


def dry_run(recipe: Recipe, console: Console, source_of: Callable[[str], Source] = ModelSource) -> DryRun:
    """Prepare a run as `train` does, try a few steps, and leave nothing behind; arguments as for `train`.

    Raises:
        InputError: Recipe, data or model cannot be used. Bad rows are reported instead, unless all are bad.
    """
    if recipe.resume:
        raise RecipeError("a dry run is of a complete run: leave resume out")
    recipe, source = settled(recipe, source_of)
    trial = replace(recipe, bad_rows="drop")  # bad rows are reported
    read = read_session(trial, source)
    session = open_session(trial, source, read, stages(console))
    with stages(console) as progress:
        progress("trying some steps", 0, 0)
        estimate = _estimate(session)
    data, rows, tokenizer = session.data["train"], session.prepared.rows["train"], session.tokenizer
    order = np.argsort(row_lengths(data), kind="stable")
    examples = []
    for number in dict.fromkeys((0, int(order[len(order) // 2]), int(order[-1]))):
        pairs = zip(data[number]["input_ids"], data[number]["labels"], strict=True)
        runs = groupby(pairs, lambda pair: pair[1] != IGNORED)
        parts = [(str(tokenizer.decode([token for token, _ in run])), labels) for labels, run in runs]
        examples.append(Example(rows[number].origin, parts))
    return DryRun(recipe, session.prepared, examples, estimate)


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Times of the start of training and of the end of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.times.append(time.perf_counter())

    on_step_end = on_train_begin


def _estimate(session: Session) -> Estimate:
    """Time a few steps. A private run is not tried, as its steps draw rows at random.

    The adapter is attached, and its values are useless afterwards.
    """
    recipe, data = session.recipe, session.data
    private, lengths = recipe.dp_epsilon is not None, row_lengths(data["train"])
    tries = _tries(recipe)
    epoch = _batches(recipe, lengths)
    tried = _tried_batches(epoch, lengths, recipe.accumulate, tries)
    short = replace(recipe, save_every=tries + 1, eval_every=None, report_to=(NO_TRACKER,), compile=False)
    train = data["train"]
    if not private:  # the noise of a private run is calibrated for all its steps
        short = replace(short, steps=tries + 1)
        train = train.select([row for batch in tried for row in batch])
    with tempfile.TemporaryDirectory() as folder:
        clock = _Clock()
        built = build(short, session.model, session.tokenizer, {**data, "train": train}, Path(folder), [clock])
        try:
            trainer, arguments = built.trainer, built.trainer.args
            session.source.check_tuned(trainer.model)
            if not private:
                arguments.max_steps = recipe.steps or -1
            steps = planned_steps(arguments, len(data["train"]))
            size = Estimate(*trainable(built), built.depth, steps, lengths_of(data["train"]))
            if private:
                return size
            arguments.max_steps, arguments.train_sampling_strategy = tries + 1, "sequential"
            arguments.eval_strategy = "no"
            trainer.train()
            saving = time.perf_counter() - clock.times[-1]  # of one checkpoint
            evaluation = _evaluation(built, data["eval"]) if "eval" in data else 0.0
        finally:
            built.release()
    first, *others = (after - before for before, after in pairwise(clock.times))
    head, *rest = (tried[at : at + recipe.accumulate] for at in range(0, len(tried), recipe.accumulate))
    costs = [_cost(batches, lengths) for batches in rest]
    rate = sum(others) / sum(costs)
    per_step = rate * _cost(epoch, lengths) / len(epoch) * recipe.accumulate
    once = max(0.0, first - rate * _cost(head, lengths))
    evaluations = steps // (recipe.eval_every or max(1, math.ceil(len(epoch) / recipe.accumulate)))
    seconds = steps * per_step + once + evaluations * evaluation + _saves(recipe, steps) * saving
    rates = np.array(others) / np.array(costs)
    uncertainty = float(2 * rates.std(ddof=1) / len(rates) ** 0.5 / rates.mean()) if rates.mean() else 0.0
    return replace(size, seconds=seconds, uncertainty=uncertainty, memory_mb=peak_memory_mb(), tried=tries)


def _tries(recipe: Recipe) -> int:
    """Number of steps to time: periodic work has the same share of them as of the run."""
    parts = zip(method_of(recipe).parts, settings_of(recipe), strict=True)
    periods = [(part.suppresses and getattr(s, "interval", 1)) or getattr(s, "support_every", 1) for part, s in parts]
    period = math.lcm(*periods)
    return min(_MOST, period * math.ceil(_LEAST / period))


def _batches(recipe: Recipe, lengths: Numbers) -> Batches:
    """Batches of an epoch, drawn as in the run."""
    size, generator = recipe.batch_size, torch.Generator().manual_seed(recipe.seed)
    if recipe.group_by_length:
        order = get_length_grouped_indices(lengths.tolist(), size * recipe.accumulate, generator=generator)
    else:
        order = torch.randperm(len(lengths), generator=generator).tolist()
    return [order[start : start + size] for start in range(0, len(order), size)]


def _tried_batches(batches: Batches, lengths: Numbers, accumulate: int, tries: int) -> Batches:
    """Batches of the trial: first the one with the longest row, then others of full size."""
    longest = max(range(len(batches)), key=lambda number: _cost([batches[number]], lengths))
    full = [batch for batch in batches if len(batch) == len(batches[0])]
    count = (tries + 1) * accumulate
    order = [batches[longest], *(full * math.ceil(count / len(full)))]
    return order[:count]


def _cost(batches: Batches, lengths: Numbers) -> int:
    """Tokens of batches, padding included."""
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


def _saves(recipe: Recipe, steps: int) -> int:
    """Number of checkpoints of a run, at least."""
    return steps // recipe.save_every if recipe.save_every else math.ceil(steps / max(10, math.ceil(steps / 10)))


def _evaluation(built: Built, data: Dataset) -> float:
    """Seconds of an evaluation, from a few batches."""
    size, lengths = built.trainer.args.eval_batch_size, row_lengths(data)
    batches = [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]
    some = batches[:: max(1, len(batches) // _EVALUATED)][:_EVALUATED]
    rows = [row for batch in some for row in batch]
    started = time.perf_counter()
    built.trainer.evaluate(data.select(rows))
    seconds = time.perf_counter() - started
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]  # a short batch moves the others
    return seconds * _cost(batches, lengths) / _cost(chunks, lengths)
