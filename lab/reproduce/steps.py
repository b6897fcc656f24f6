"""Steps of the protocols; each is done once in a folder, and resumes after an interruption."""

import gc
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lab.reproduce.answers import Answers, Asking, ask, read_record
from lab.reproduce.tasks import Task
from siftune.base.errors import RecipeError, TrainingError
from siftune.base.files import Progress, write_beside
from siftune.data.read import load_rows
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe
from siftune.report.rates import bests, write_report
from siftune.train.rates.grid import Grid
from siftune.train.rates.sweep import LRFolder, open_sweep, run_missing
from siftune.train.run import train
from siftune.train.source import ModelSource, Source

_RUN = "run.json"


def begin(out: Path, about: Mapping[str, Any], unsaid: Mapping[str, Any] | None = None) -> None:
    """Note in a folder what it is of, or see that it is of the same.

    Args:
        out: The folder.
        about: What it is of.
        unsaid: What a folder is of that does not say so, as it was begun before there was a choice.

    Raises:
        RecipeError: It is of something else.
    """
    path, known = out / "protocol.json", json.loads(json.dumps(about))
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out} is a file: give a folder with --out")
    begun = path.exists() and (out / "data").is_dir()  # else nothing was made: rows were not found, say
    before = {**(unsaid or {}), **read_record(path)} if begun else known
    changed = [key for key in known if before.get(key) != known[key]]
    if changed:
        key = changed[0]
        raise RecipeError(
            f"{out} was begun with {key} = {before.get(key)}, but now it is {known[key]}: set it as it was, "
            "or give another folder with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    with write_beside(path) as [beside]:
        beside.write_text(json.dumps({**before, **known}, indent=2) + "\n", encoding="utf-8")


def swept(
    recipe: Recipe, grid: Grid, folder: Path, steps: int | None, progress: Progress,
    source_of: Callable[[str], Source] = ModelSource,
) -> Mapping[str, float]:  # fmt: skip
    """The best rate of each method on the held-out rows; with one rate in the grid, that one.

    Args:
        recipe: Of the runs.
        grid: Methods, rates and seeds.
        folder: Of the sweep.
        steps: Of each run; None: as many as the recipe has.
        progress: Reports progress.
        source_of: As for `train`.

    Raises:
        TrainingError: At every rate of a method training diverged.
    """
    if len(grid.rates) == 1:
        return dict.fromkeys(grid.methods, grid.rates[0])
    sweep = open_sweep(recipe if steps is None else replace(recipe, steps=steps), grid, folder, source_of)
    for _ in run_missing(sweep, progress):
        write_report(sweep.folder)
    best = {one.method: one.lr for one in bests(LRFolder(folder).runs())}
    diverged = [method for method in grid.methods if best[method] is None]
    if diverged:
        raise TrainingError(f"{diverged[0]} diverged at every rate: give lower ones with --rates")
    return {method: rate for method, rate in best.items() if rate is not None}


def run_once(recipe: Recipe, folder: Path, console: Console, source_of: Callable[[str], Source] = ModelSource) -> None:
    """Train into a folder, unless it holds a finished run; resume where it holds a part of one."""
    if rate_of(folder) is not None:
        return
    drop_ended(folder)
    begun = any((folder / "checkpoints").glob("checkpoint-*"))
    if not begun and (folder / _RUN).exists():
        shutil.rmtree(folder)  # cut off before its first checkpoint: there is nothing to resume from
    train(replace(recipe, out=str(folder), resume=begun), console, source_of)
    gc.collect()  # the Trainer refers to itself: without this two models would be in memory


def drop_ended(folder: Path) -> None:
    """Remove checkpoints of the last step of a run whose result was not saved: there is nothing left to train from."""
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        path = checkpoint / "trainer_state.json"
        state = read_record(path) if path.exists() else {}
        if state and state["global_step"] >= state["max_steps"]:
            shutil.rmtree(checkpoint)


def rate_of(folder: Path) -> float | None:
    """The learning rate of a finished run; None before it has finished."""
    path = folder / _RUN
    finished = path.exists() and read_record(path)["status"] == "finished"
    return load_recipe(folder / "recipe.yaml").lr if finished else None


def refuse_other_rate(folder: Path, rate: float) -> None:
    """Refuse a rate that is not the one that a finished run was trained at.

    Raises:
        RecipeError: It is another.
    """
    was = rate_of(folder)
    if was is not None and not math.isclose(was, rate):
        raise RecipeError(
            f"{folder} was trained at a learning rate of {was:g}, but now it would be {rate:g}: give --rates "
            "and the first of --seeds as they were, or another folder with --out"
        )


def ask_all(
    load: Callable[[], tuple[Any, Any]], tasks: Mapping[str, tuple[Task, Answers]], data: Path, asking: Asking,
    progress: Progress,
) -> None:  # fmt: skip
    """Ask what has not been asked, of a model that is loaded only where there is anything.

    Args:
        load: Makes the model and its tokenizer.
        tasks: Name -> task, and the file of its answers.
        data: Folder of the questions, in NAME.jsonl.
        asking: How to ask.
        progress: Receives every task.
    """
    missing = {name: one for name, one in tasks.items() if asking.missing(one[1], one[0])}
    if not missing:
        return
    model, tokenizer = load()
    for number, (name, (task, answers)) in enumerate(missing.items()):
        progress(f"{answers.path.parent.name} answers {name}", number, len(missing))
        ask(model, tokenizer, load_rows(str(data / f"{name}.jsonl")), task, answers, asking)
