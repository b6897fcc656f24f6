"""Protocols by name: the recipe, the tasks and the papers' figures of each. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lab.reproduce.harness import HARNESS
from lab.reproduce.tasks import TASKS, Task
from siftune.base.errors import RecipeError
from siftune.base.settings import nearest
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Suite:
    """Tasks that are trained on together, or each by itself where there are emulators.

    Attributes:
        tasks: Their names; see `tasks.TASKS` and `harness.HARNESS`.
        held_out: How many of them are held out.
        rates: Learning rates that are tried.
        max_new_tokens: Longest answer.
        metrics: Which of `answers.METRICS` are asked.
        methods: What is compared by default.
        joint: Name of the file with the training rows of all; empty where each task is tuned on by itself.
        hub: Hub id of these rows; None where there is none.
        emulators: Emulators by name -> settings of `siftune emulate`; none in a suite of one party.
    """

    tasks: tuple[str, ...]
    held_out: int
    rates: tuple[float, ...]
    max_new_tokens: int
    metrics: tuple[str, ...]
    methods: tuple[str, ...]
    joint: str = ""
    hub: str | None = None
    emulators: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def tables(self) -> Mapping[str, Task]:
        """Its tasks by name."""
        known = HARNESS if self.emulators else TASKS
        return {name: known[name] for name in self.tasks}


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
        printed: What papers print of it; may be empty.
    """

    name: str
    suite: Suite
    recipe: Recipe
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
    suite, _, _ = name.partition("-")
    facts = _facts()
    one: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in facts["suites"][suite].items()
    }
    return Protocol(
        name=name,
        suite=Suite(**one),
        recipe=load_recipe(*recipe_files(name), *recipes),
        printed=tuple(_printed(row, one["tasks"]) for row in facts["tables"].get(name, [])),
    )


def recipe_files(name: str) -> list[Path]:
    """The recipe files of a protocol: of its suite, and of its model, whose lines stand in the place of the former's.

    Where whole layers are tuned it is the other way round: the modules that the model names are not asked for there.
    """
    suite, _, model = name.partition("-")
    parts = (model, suite) if "emulators" in _facts()["suites"][suite] else (suite, model)
    return [_HERE / "papers" / f"{part}.yaml" for part in parts]


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
