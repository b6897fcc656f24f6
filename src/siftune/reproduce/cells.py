"""The work of a protocol: learning rates first, then a run for each method and seed, and its answers.

OUT/
  protocol.json          what the folder is of; another call must be of the same
  data/                  the rows: see `rows.py`
  rates/                 a sweep of learning rates, as `siftune sweep-lr` leaves it
  METHOD-seed0/          a run folder, as `siftune train` leaves it, with TASK.answers.json for each task
  table.md, results.json

Each of these is made once. A run that was cut off goes on from its newest checkpoint; answers are made task by task.
"""

import gc
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from siftune.artifacts import find_subject, load_subject
from siftune.config import Recipe
from siftune.data.readers import load_rows
from siftune.errors import RecipeError, TrainingError
from siftune.evaluate.answers import is_right
from siftune.evaluate.measure import measure
from siftune.evaluate.prepare import prepare_rows
from siftune.files import Progress, write_beside
from siftune.recipe_file import load_recipe
from siftune.report.lr import bests, write_report
from siftune.reproduce.protocol import Protocol
from siftune.reproduce.tasks import TASKS
from siftune.trainer.lr_folder import LRFolder
from siftune.trainer.lr_grid import Grid, recipes_of
from siftune.trainer.lr_sweep import open_sweep, run_missing
from siftune.trainer.run import train

_RUN = "run.json"


@dataclass(frozen=True)
class Cell:
    """A method with a seed.

    Attributes:
        method: The method.
        seed: The seed.
        folder: Its run folder.
    """

    method: str
    seed: int
    folder: Path

    def right(self, task: str) -> Mapping[str, list[int]] | None:
        """By metric, 1 or 0 for each question; None where it has not been asked.

        `generated`: the answer in the text that the model writes; `likeliest`: the option that it finds likeliest.
        """
        path = self._answers(task)
        return _record(path)["right"] if path.exists() else None

    def finished(self) -> bool:
        """Whether its training has come to its end."""
        path = self.folder / _RUN
        return path.exists() and _record(path)["status"] == "finished"

    def refuse_other_rate(self, rate: float) -> None:
        """Refuse a rate that is not the one that a finished run was trained at.

        Raises:
            RecipeError: It is another.
        """
        was = self.rate()
        if was is not None and not math.isclose(was, rate):
            raise RecipeError(
                f"{self.folder} was trained at a learning rate of {was:g}, but now it would be {rate:g}: give --rates "
                "and the first of --seeds as they were, or another folder with --out"
            )

    def rate(self) -> float | None:
        """The learning rate that it was trained at; None before it has finished."""
        return load_recipe(self.folder / "recipe.yaml").lr if self.finished() else None

    def keep(self, task: str, right: Mapping[str, Sequence[int]], texts: Sequence[str]) -> None:
        """Write what was found of a task."""
        with write_beside(self._answers(task)) as [beside]:
            beside.write_text(json.dumps({"right": right, "texts": texts}, ensure_ascii=False) + "\n", encoding="utf-8")

    def _answers(self, task: str) -> Path:
        return self.folder / f"{task}.answers.json"


@dataclass(frozen=True)
class Reproduction:
    """A protocol at work in a folder.

    Attributes:
        protocol: The protocol.
        tasks: Its tasks that are asked.
        grid: Methods, learning rates to try, and seeds.
        out: The folder.
        sweep_steps: Steps of each run of the sweep; None: as many as a run has.
        batch_size: Rows in a forward pass when questions are asked.
    """

    protocol: Protocol
    tasks: tuple[str, ...]
    grid: Grid
    out: Path
    sweep_steps: int | None = None
    batch_size: int = 16

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of all runs, but for method, rate and seed."""
        data = self.out / "data"
        return replace(self.protocol.recipe, train=str(data / "train.jsonl"), eval=str(data / "heldout.jsonl"))

    def cells(self) -> list[Cell]:
        """All cells, seed by seed, so that an early end leaves whole comparisons."""
        return [
            Cell(method, seed, self.out / f"{method}-seed{seed}")
            for seed in self.grid.seeds
            for method in self.grid.methods
        ]

    def begin(self, about: Mapping[str, Any]) -> None:
        """Note what the folder is of, or see that it is of the same.

        Args:
            about: What decides the results besides methods, rates and seeds.

        Raises:
            RecipeError: It is of something else.
        """
        recipes_of(self.recipe, self.grid.methods)  # refuses what cannot run, before anything is written
        path, known = self.out / "protocol.json", json.loads(json.dumps(about))
        if self.out.exists() and not self.out.is_dir():
            raise RecipeError(f"{self.out} is a file: give a folder with --out")
        begun = path.exists() and (self.out / "data").is_dir()  # else nothing was made: rows were not found, say
        before = _record(path) if begun else known
        changed = [key for key in known if before.get(key) != known[key]]
        if changed:
            key = changed[0]
            raise RecipeError(
                f"{self.out} was begun with {key} = {before.get(key)}, but now it is {known[key]}: set it as it was, "
                "or give another folder with --out"
            )
        self.out.mkdir(parents=True, exist_ok=True)
        with write_beside(path) as [beside]:
            beside.write_text(json.dumps({**before, **known}, indent=2) + "\n", encoding="utf-8")

    def rates(self, progress: Progress) -> Mapping[str, float]:
        """The best rate of each method on the held-out rows; with one rate in the grid, that one.

        Raises:
            TrainingError: At every rate of a method training diverged.
        """
        if len(self.grid.rates) == 1:
            return dict.fromkeys(self.grid.methods, self.grid.rates[0])
        short = self.recipe if self.sweep_steps is None else replace(self.recipe, steps=self.sweep_steps)
        grid = replace(self.grid, seeds=self.grid.seeds[:1])
        sweep = open_sweep(short, grid, self.out / "rates")
        for _ in run_missing(sweep, progress):
            write_report(sweep.folder)
        best = {one.method: one.lr for one in bests(LRFolder(self.out / "rates").runs())}
        diverged = [method for method in self.grid.methods if best[method] is None]
        if diverged:
            raise TrainingError(f"{diverged[0]} diverged at every rate: give lower ones with --rates")
        return {method: rate for method, rate in best.items() if rate is not None}

    def work(self, console: Console, progress: Progress) -> Iterator[Cell]:
        """Do what is missing, and yield each cell when all of it is there."""
        rates = self.rates(progress)
        for cell in self.cells():
            cell.refuse_other_rate(rates[cell.method])
        for cell in self.cells():
            if not cell.finished():
                self._train(cell, rates[cell.method], console)
            asked = [task for task in self.tasks if cell.right(task) is None]
            if asked:
                self._ask(cell, asked, progress)
            yield cell

    def _train(self, cell: Cell, rate: float, console: Console) -> None:
        (recipe,) = recipes_of(self.recipe, [cell.method]).values()
        begun = any((cell.folder / "checkpoints").glob("checkpoint-*"))
        if not begun and (cell.folder / _RUN).exists():
            shutil.rmtree(cell.folder)  # cut off before its first checkpoint: there is nothing to go on from
        train(replace(recipe, lr=rate, seed=cell.seed, out=str(cell.folder), resume=begun), console)
        gc.collect()  # the Trainer refers to itself: without this two models would be in memory

    def _ask(self, cell: Cell, tasks: Sequence[str], progress: Progress) -> None:
        model, tokenizer = load_subject(find_subject(str(cell.folder)), self.recipe.dtype)
        for number, task in enumerate(tasks):
            progress(f"{cell.folder.name} answers {task}", number, len(tasks))
            rows = load_rows(str(self.out / "data" / f"{task}.jsonl"))
            choice = TASKS[task].reader == "option"
            metrics = ("choices", "exact_match") if choice else ("exact_match",)
            prepared = prepare_rows(rows, tokenizer, metrics, self.recipe.template, self.protocol.suite.max_new_tokens)
            found = measure(model, prepared, self.batch_size)
            texts = found["exact_match"].texts
            right = {"generated": [int(_right(row.extra, text, task)) for row, text in zip(rows, texts, strict=True)]}
            if choice:
                right["likeliest"] = found["choices"].values.astype(int).tolist()
            cell.keep(task, right, texts)
        del model
        gc.collect()


def _record(path: Path) -> dict[str, Any]:
    """What a file that was written here holds.

    Raises:
        RecipeError: It is damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise RecipeError(f"{path} is damaged: remove it, so that it is made anew")
    return record


def _right(question: Mapping[str, Any], text: str, task: str) -> bool:
    options = [choice.rpartition(" ")[2] for choice in question.get("choices", ())]
    answer = options[question["answer"]] if options else str(question["answer"])
    return is_right(text, answer, TASKS[task].reader, options)
