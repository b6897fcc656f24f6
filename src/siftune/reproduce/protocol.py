"""Protocols by name: the recipe, the tasks, the model's shape and the papers' figures of each. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from siftune.config import Recipe
from siftune.errors import RecipeError
from siftune.recipe_file import load_recipe
from siftune.settings import nearest

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Suite:
    """Tasks that are trained on together.

    Attributes:
        tasks: Their names; see `tasks.TASKS`.
        joint: Name of the file with the training rows of all.
        hub: Hub id of these rows; None where there is none.
        rows: How many these are.
        held_out: How many of them are held out.
        rates: Learning rates that are tried.
        max_new_tokens: Longest answer.
    """

    tasks: tuple[str, ...]
    joint: str
    hub: str | None
    rows: int
    held_out: int
    rates: tuple[float, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Printed:
    """A row of a paper's table.

    Attributes:
        who: The adapter.
        source: Which paper.
        right: Per cent of right answers by task.
    """

    who: str
    source: str
    right: Mapping[str, float]


@dataclass(frozen=True)
class Protocol:
    """What is to be reproduced.

    Attributes:
        name: Suite and model with a hyphen between.
        suite: The tasks.
        recipe: Settings of a run, without rows, method, rate and seed.
        config: Of the real model, for `AutoConfig.for_model`.
        printed: What papers print of it; may be empty.
    """

    name: str
    suite: Suite
    recipe: Recipe
    config: Mapping[str, Any]
    printed: tuple[Printed, ...]


def names() -> list[str]:
    """Names of all protocols."""
    return [f"{suite}-{model}" for suite in _facts()["suites"] for model in _facts()["models"]]


def protocol_of(name: str, *recipes: str) -> Protocol:
    """A protocol by its name.

    Args:
        name: Such as commonsense-llama-7b.
        recipes: Recipe files whose lines stand in the place of the paper's.

    Raises:
        RecipeError: There is none of that name, or a recipe cannot be read.
    """
    if name not in names():
        close = nearest(name, names())
        guess = f"did you mean {close}?" if close else f"there are {', '.join(names())}"
        raise RecipeError(f"there is no protocol {name!r}; {guess}")
    suite, _, model = name.partition("-")
    facts = _facts()
    one = facts["suites"][suite]
    tasks = tuple(one["tasks"])
    return Protocol(
        name=name,
        suite=Suite(**{**one, "tasks": tasks, "rates": tuple(one["rates"])}),
        recipe=load_recipe(*recipe_files(name), *recipes),
        config=facts["models"][model],
        printed=tuple(_printed(row, tasks) for row in facts["tables"].get(name, [])),
    )


def recipe_files(name: str) -> list[Path]:
    """The recipe files of a protocol: of its suite, and of its model."""
    suite, _, model = name.partition("-")
    return [_HERE / "papers" / f"{part}.yaml" for part in (suite, model)]


def sources() -> Mapping[str, str]:
    """Which paper each source of figures is, and where they were read."""
    found: Mapping[str, str] = _facts()["sources"]
    return found


def _printed(row: Mapping[str, Any], tasks: Sequence[str]) -> Printed:
    return Printed(row["who"], row["source"], dict(zip(tasks, row["right"], strict=True)))


@cache
def _facts() -> Mapping[str, Any]:
    found: Mapping[str, Any] = yaml.safe_load((_HERE / "facts.yaml").read_text(encoding="utf-8"))
    return found
