"""Dry runs: validate the data, preview the loss mask, measure the memory of a step. Nothing is kept.

Memory peaks in the step with the longest rows, once the optimizer has its states. So two steps of the run are done on
its longest rows (ours); methods that draw layers may draw lower ones in other steps, which need more memory.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from siftune.base.environment import peak_memory_mb
from siftune.base.errors import RecipeError
from siftune.base.stages import stages
from siftune.models.loss import IGNORED
from siftune.recipe.checks import NO_TRACKER
from siftune.recipe.schema import Recipe
from siftune.train.build import build, trainable
from siftune.train.prepare import Lengths, Prepared, lengths_of, row_lengths, trained_and_held_out
from siftune.train.session import Session, open_session, read_session, settled
from siftune.train.source import ModelSource, Source
from siftune.train.trainer import planned_steps

_TRIED = 2  # steps: the first one creates the optimizer's states


@dataclass(frozen=True)
class Size:
    """Size and memory of a run."""

    trainable: int  # parameters
    parameters: int
    layers: int  # layers with trainable parameters
    steps: int
    lengths: Lengths
    memory_mb: float | None = None  # peak of a step, in 10^6 bytes; None for a private run


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
    size: Size

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types."""
        size, lengths, data = self.size, self.size.lengths, self.prepared.data
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
            "trainable": size.trainable,
            "parameters": size.parameters,
            "layers": size.layers,
            "steps": size.steps,
            "memory_mb": size.memory_mb and round(size.memory_mb, 1),
        }


def dry_run(recipe: Recipe, console: Console, source_of: Callable[[str], Source] = ModelSource) -> DryRun:
    """Prepare a run as `train` does, try a step, and leave nothing behind; arguments as for `train`.

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
        progress("trying a step", 0, 0)
        size = _size(session)
    data, rows, tokenizer = session.data["train"], session.prepared.rows["train"], session.tokenizer
    order = np.argsort(row_lengths(data), kind="stable")
    examples = []
    for number in dict.fromkeys((0, int(order[len(order) // 2]), int(order[-1]))):
        pairs = zip(data[number]["input_ids"], data[number]["labels"], strict=True)
        runs = groupby(pairs, lambda pair: pair[1] != IGNORED)
        parts = [(str(tokenizer.decode([token for token, _ in run])), labels) for labels, run in runs]
        examples.append(Example(rows[number].origin, parts))
    return DryRun(recipe, session.prepared, examples, size)


def _size(session: Session) -> Size:
    """Measure a step. A private run is not tried, as its steps draw rows at random.

    The adapter is attached, and its values are useless afterwards.
    """
    recipe, data = session.recipe, session.data
    train, private = data["train"], recipe.dp_epsilon is not None
    short = replace(recipe, save_every=None, eval_every=None, report_to=(NO_TRACKER,), compile=False)
    if not private:  # the noise of a private run is calibrated for all its steps
        order = np.argsort(-row_lengths(train), kind="stable")
        short, train = replace(short, steps=_TRIED), train.select(order[: recipe.batch_size * recipe.accumulate])
    with tempfile.TemporaryDirectory() as folder:
        built = build(short, session.model, session.tokenizer, {**data, "train": train}, Path(folder))
        try:
            trainer, arguments = built.trainer, built.trainer.args
            session.source.check_tuned(trainer.model)
            if not private:
                arguments.max_steps = recipe.steps or -1
            steps = planned_steps(arguments, len(data["train"]))
            size = Size(*trainable(built), built.depth, steps, lengths_of(data["train"]))
            if private:
                return size
            arguments.max_steps, arguments.eval_strategy = _TRIED, "no"
            trainer.train()
        finally:
            built.release()
    return replace(size, memory_mb=peak_memory_mb())
