"""Runs of a reproduction: learning rates first, then a run for each method and seed, and its answers.

OUT/
  protocol.json            what decides the results; another call must agree
  data/                    the rows: see `questions.py`
  untuned/                 TASK.answers.json of the untuned model
  lora-learned/            runs with one adapter type, with prompts learned or masked
    rates/                 a sweep of learning rates, as `siftune find-lr` records it
    METHOD-seed0/          a run folder, as `siftune train` leaves it, with TASK.answers.json for each task
  table.md, results.json

Each of these is made once. An interrupted run resumes from its newest checkpoint; answers are written task by task.
"""

import gc
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from lab.reproduce.answers import Answers, Asking, ask, read_record
from lab.reproduce.table import Line
from siftune.base.errors import RecipeError, TrainingError
from siftune.base.files import Progress, write_beside
from siftune.cli.subjects import find_subject, load_subject
from siftune.data.read import load_rows
from siftune.models.adapters.registry import ADAPTER_TYPES
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe
from siftune.report.rates import bests
from siftune.train.rates.grid import Grid, recipes_of
from siftune.train.rates.sweep import open_sweep, run_missing
from siftune.train.run import train

_SAME_SIZE = {"lora", "dora"}  # DoRA's paper has LoRA's rank, scale and targets


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
        """Name of its folder."""
        return f"{self.adapter}-{self.prompts}"

    def recipe(self, recipe: Recipe) -> Recipe:
        """A recipe with this adapter; another kind than the recipe's has its own default size and targets."""
        changed = replace(recipe, completion_only=self.prompts == "masked", adapter=self.adapter)
        if self.adapter == recipe.adapter or {self.adapter, recipe.adapter} <= _SAME_SIZE:
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
    """A reproduction in a folder.

    Attributes:
        recipe: Recipe of all runs, without method, rate and seed.
        tasks: Tasks that are evaluated.
        grid: Methods, learning rates to try, and seeds.
        groups: Adapter types, with prompts learned or masked.
        out: The folder.
        asking: How questions are asked.
        sweep_steps: Steps of each run of the sweep; None: the recipe's.
    """

    recipe: Recipe
    tasks: tuple[str, ...]
    grid: Grid
    groups: tuple[Group, ...]
    out: Path
    asking: Asking
    sweep_steps: int | None = None

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
        """Method that the last column of the tables subtracts."""
        return "dense" if "dense" in self.grid.methods and len(self.grid.methods) > 1 else None

    def lines(self) -> list[Line]:
        """Lines of the tables: the untuned model, then each group's methods."""
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
        cells = {self.label(cell.group, cell.method): _rate_of(cell.folder) for cell in reversed(self.cells())}
        return {label: rate for label, rate in reversed(cells.items()) if rate is not None}

    def label(self, group: Group, method: str) -> str:
        """Name of a group's method in tables."""
        both = len({one.prompts for one in self.groups}) > 1
        return f"{method}, {group.adapter}{f', {group.prompts}' if both else ''}"

    def begin(self, about: Mapping[str, Any]) -> None:
        """Write what decides the results besides methods, adapters, rates and seeds, or compare it with the folder's.

        Raises:
            RecipeError: The folder differs, or a method cannot run.
        """
        for group in self.groups:
            recipes_of(self._recipe(group), self.grid.methods)  # refuses what cannot run, before anything is written
        path, ours = self.out / "protocol.json", json.loads(json.dumps(about))
        if self.out.exists() and not self.out.is_dir():
            raise RecipeError(f"{self.out} is a file: give a folder with --out")
        begun = path.exists() and (self.out / "data").is_dir()
        before = read_record(path) if begun else ours
        changed = [key for key in ours if before.get(key) != ours[key]]
        if changed:
            key = changed[0]
            raise RecipeError(
                f"{self.out} was begun with {key} = {before.get(key)}, but now it is {ours[key]}: set it as it was, "
                "or give another folder with --out"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        with write_beside(path) as [beside]:
            beside.write_text(json.dumps({**before, **ours}, indent=2) + "\n", encoding="utf-8")

    def work(self, console: Console, progress: Progress) -> Iterator[str]:
        """Do what is missing, and name each part when it is complete."""
        self._ask(self.out / "untuned", self.recipe.model, progress)
        yield "untuned"
        rates: dict[Group, Mapping[str, float]] = {}
        for cell in self.cells():
            if cell.group not in rates:
                rates[cell.group] = self._rates(cell.group, progress)
            (recipe,) = recipes_of(self._recipe(cell.group), [cell.method]).values()
            _run_once(replace(recipe, lr=rates[cell.group][cell.method], seed=cell.seed), cell.folder, console)
            self._ask(cell.folder, str(cell.folder), progress)
            yield f"{cell.group.name}/{cell.folder.name}"

    def _answers(self, folder: Path) -> dict[str, Answers]:
        return {task: Answers(folder / f"{task}.answers.json") for task in self.tasks}

    def _recipe(self, group: Group) -> Recipe:
        data = self.out / "data"
        return replace(group.recipe(self.recipe), train=str(data / "train.jsonl"), eval=str(data / "heldout.jsonl"))

    def _rates(self, group: Group, progress: Progress) -> Mapping[str, float]:
        """The best rate of each method on the held-out rows; a finished run must have been trained at it."""
        rates = self._swept(group, progress)
        for cell in self.cells():
            before = _rate_of(cell.folder) if cell.group == group else None
            if before is not None and not math.isclose(before, rates[cell.method]):
                raise RecipeError(
                    f"{cell.folder} was trained at a learning rate of {before:g}, but now it would be "
                    f"{rates[cell.method]:g}: give --rates and the first of --seeds as they were, or another folder "
                    "with --out"
                )
        return rates

    def _swept(self, group: Group, progress: Progress) -> Mapping[str, float]:
        if len(self.grid.rates) == 1:
            return dict.fromkeys(self.grid.methods, self.grid.rates[0])
        recipe = self._recipe(group)
        recipe = recipe if self.sweep_steps is None else replace(recipe, steps=self.sweep_steps)
        grid = replace(self.grid, seeds=self.grid.seeds[:1])
        sweep = open_sweep(recipe, grid, self.out / group.name / "rates")
        for _ in run_missing(sweep, progress):
            pass  # every run is in the folder
        best = {one.method: one.lr for one in bests(sweep.runs())}
        diverged = [method for method in self.grid.methods if best[method] is None]
        if diverged:
            raise TrainingError(f"{diverged[0]} diverged at every rate: give lower ones with --rates")
        return {method: rate for method, rate in best.items() if rate is not None}

    def _ask(self, folder: Path, subject: str, progress: Progress) -> None:
        """Ask what has not been asked of a model, which is only loaded if anything is missing."""
        answers = self._answers(folder)
        missing = {task: file for task, file in answers.items() if self.asking.missing(file)}
        if not missing:
            return
        model, tokenizer = load_subject(find_subject(subject), self.recipe.dtype)
        for number, (task, file) in enumerate(missing.items()):
            progress(f"{folder.name} answers {task}", number, len(missing))
            ask(model, tokenizer, load_rows(str(self.out / "data" / f"{task}.jsonl")), file, self.asking)


def _run_once(recipe: Recipe, folder: Path, console: Console) -> None:
    """Train into a folder, unless it has a finished run; resume if it has checkpoints."""
    if _rate_of(folder) is not None:
        return
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        path = checkpoint / "trainer_state.json"
        state = read_record(path) if path.exists() else {}
        if state and state["global_step"] >= state["max_steps"]:
            shutil.rmtree(checkpoint)  # of a run whose result was not saved: nothing is left to train
    begun = any((folder / "checkpoints").glob("checkpoint-*"))
    if not begun and (folder / "run.json").exists():
        shutil.rmtree(folder)  # interrupted before its first checkpoint
    train(replace(recipe, out=str(folder), resume=begun), console)
    gc.collect()  # the Trainer refers to itself: without this two models would be in memory


def _rate_of(folder: Path) -> float | None:
    """The learning rate of a finished run; None before it has finished."""
    path = folder / "run.json"
    finished = path.exists() and read_record(path)["status"] == "finished"
    return load_recipe(folder / "recipe.yaml").lr if finished else None
