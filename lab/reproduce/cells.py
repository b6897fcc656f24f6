"""Steps of a protocol: learning rates first, then a run for each method and seed, and its answers.

OUT/
  protocol.json            what the folder is of; another call must be of the same
  data/                    the rows: see `rows.py`
  untuned/                 TASK.answers.json of the untuned model
  lora-learned/            runs with one adapter type that learn the prompts, or do not (masked)
    rates/                 a sweep of learning rates, as `siftune find-lr` leaves it
    METHOD-seed0/          a run folder, as `siftune train` leaves it, with TASK.answers.json for each task
  table.md, results.json

Each of these is made once. A run that was cut off resumes from its newest checkpoint; answers are made task by task.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from lab.reproduce.answers import Answers, Asking
from lab.reproduce.protocol import Protocol
from lab.reproduce.rows import Wording, prepare_files
from lab.reproduce.steps import ask_all, begin, rate_of, refuse_other_rate, run_once, swept
from lab.reproduce.table import Line
from lab.reproduce.tasks import TASKS
from siftune.base.files import Progress
from siftune.cli.subjects import find_subject, load_subject
from siftune.models.adapters.registry import ADAPTER_TYPES
from siftune.recipe.schema import Recipe
from siftune.train.rates.grid import Grid, recipes_of

_ALIKE = ("lora", "dora")  # DoRA's paper has LoRA's rank, scale and places


@dataclass(frozen=True)
class Group:
    """Runs that differ only in method, rate and seed.

    Attributes:
        adapter: Adapter type.
        prompts: "learned", as the papers' code has it, or "masked".
    """

    adapter: str
    prompts: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.adapter}-{self.prompts}"

    def recipe(self, recipe: Recipe) -> Recipe:
        """A recipe with this adapter: of another kind than the recipe's with that kind's own size and places."""
        changed = replace(recipe, completion_only=self.prompts == "masked", adapter=self.adapter)
        if self.adapter == recipe.adapter or {self.adapter, recipe.adapter} <= {*_ALIKE}:
            return changed
        dropout = recipe.dropout if self.adapter != "full" and "dropout" in ADAPTER_TYPES[self.adapter].keys else 0.0
        return replace(changed, rank=None, alpha=None, targets=None, dropout=dropout)


class Cell(NamedTuple):
    """A run: a group's method with a seed, and its folder."""

    group: Group
    method: str
    seed: int
    folder: Path


@dataclass(frozen=True)
class Reproduction:
    """A protocol at work in a folder.

    Attributes:
        protocol: The protocol.
        tasks: Its tasks that are asked.
        grid: Methods, learning rates to try, and seeds.
        groups: Adapter types, and what is learned.
        out: The folder.
        asking: How questions are asked.
        sweep_steps: Steps of each run of the sweep; None: as many as a run has.
        answers: As for `rows.prepare_files`.
    """

    protocol: Protocol
    tasks: tuple[str, ...]
    grid: Grid
    groups: tuple[Group, ...]
    out: Path
    asking: Asking
    sweep_steps: int | None = None
    answers: Wording = "names"

    def cells(self) -> list[Cell]:
        """All cells, seed by seed, so that an early end leaves complete comparisons."""
        return [
            Cell(group, method, seed, self.out / group.name / f"{method}-seed{seed}")
            for seed in self.grid.seeds
            for group in self.groups
            for method in self.grid.methods
        ]

    @property
    def reference(self) -> str | None:
        """What the last column of the tables takes off."""
        return "dense" if "dense" in self.grid.methods and len(self.grid.methods) > 1 else None

    def lines(self) -> list[Line]:
        """Lines of the tables: the untuned model, then each group's methods, against dense if it was run."""
        lines = [Line("untuned", [self._answers(self.out / "untuned")])]
        for group in self.groups:
            dense = self.label(group, "dense") if self.reference else None
            for method in self.grid.methods:
                label, own = self.label(group, method), (group, method)
                seeds = [self._answers(cell.folder) for cell in self.cells() if (cell.group, cell.method) == own]
                lines.append(Line(label, seeds, None if dense == label else dense))
        return lines

    def rates(self) -> dict[str, float]:
        """The learning rate of each line whose runs have finished."""
        cells = {self.label(cell.group, cell.method): rate_of(cell.folder) for cell in reversed(self.cells())}
        return {label: rate for label, rate in reversed(cells.items()) if rate is not None}

    def label(self, group: Group, method: str) -> str:
        """What a group's method is called in tables."""
        both = len({one.prompts for one in self.groups}) > 1
        return f"{method}, {group.adapter}{f', {group.prompts}' if both else ''}"

    def _answers(self, folder: Path) -> dict[str, Answers]:
        return {task: Answers(folder / f"{task}.answers.json") for task in self.tasks}

    def recipe(self, group: Group) -> Recipe:
        """The recipe of a group's runs, but for method, rate and seed."""
        data = self.out / "data"
        recipe = group.recipe(self.protocol.recipe)
        return replace(recipe, train=str(data / "train.jsonl"), eval=str(data / "heldout.jsonl"))

    def begin(self, about: Mapping[str, Any]) -> None:
        """Note what the folder is of, or see that it is of the same.

        Args:
            about: What decides the results besides methods, adapters, rates and seeds.

        Raises:
            RecipeError: It is of something else, or a method cannot run.
        """
        for group in self.groups:
            recipes_of(self.recipe(group), self.grid.methods)  # refuses what cannot run, before anything is written
        begin(self.out, about, {"answers": "names"})

    def prepare(self, data: str, limit: int | None, questions: int | None) -> None:
        """Write the rows; see `rows.prepare_files`."""
        prepare_files(self.protocol.suite, self.tasks, data, self.out / "data", limit, questions, self.answers)

    def work(self, console: Console, progress: Progress) -> Iterator[str]:
        """Do what is missing, and name each part when all of it is there."""
        self._ask(self.out / "untuned", self.protocol.recipe.model, progress)
        yield "untuned"
        rates: dict[Group, Mapping[str, float]] = {}
        for cell in self.cells():
            if cell.group not in rates:
                rates[cell.group] = self._rates(cell.group, progress)
            (recipe,) = recipes_of(self.recipe(cell.group), [cell.method]).values()
            run_once(replace(recipe, lr=rates[cell.group][cell.method], seed=cell.seed), cell.folder, console)
            self._ask(cell.folder, str(cell.folder), progress)
            yield f"{cell.group.name}/{cell.folder.name}"

    def _rates(self, group: Group, progress: Progress) -> Mapping[str, float]:
        """The best rate of each method; no run that is there already may have been trained at another."""
        grid = replace(self.grid, seeds=self.grid.seeds[:1])
        rates = swept(self.recipe(group), grid, self.out / group.name / "rates", self.sweep_steps, progress)
        for cell in self.cells():
            if cell.group == group:
                refuse_other_rate(cell.folder, rates[cell.method])
        return rates

    def _ask(self, folder: Path, subject: str, progress: Progress) -> None:
        tasks = {task: (TASKS[task], answers) for task, answers in self._answers(folder).items()}
        dtype = self.protocol.recipe.dtype
        ask_all(lambda: load_subject(find_subject(subject), dtype), tasks, self.out / "data", self.asking, progress)
