"""A run that is not made: all that can be said of it before, and nothing left behind."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from siftune.base.errors import RecipeError
from siftune.base.stages import stages
from siftune.models.loss import IGNORED
from siftune.recipe.checks import check
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.train.before import row_lengths, trained_and_held_out
from siftune.train.forecast import Forecast, forecast
from siftune.train.prepare import Prepared, prepare, read_rows
from siftune.train.source import ModelSource, Source
from siftune.train.start import adopted
from siftune.train.trackers import check_trackers


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
