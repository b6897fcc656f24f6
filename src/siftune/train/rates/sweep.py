"""A learning-rate sweep: every method at every rate, each run as `train` does it, measured on held-out rows.

The model is loaded afresh for every run and thrown away after it: no adapter has to come off bit for bit, layers whose
own weights train need no copy, and loading costs little beside training. Nothing is kept of a run but its figures.
"""

import gc
import hashlib
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from datasets import Dataset
from torch import nn

from siftune.base.errors import RecipeError, TrainingError
from siftune.base.files import Progress
from siftune.base.ranks import launch_size
from siftune.data.rows import Row
from siftune.evaluate.perplexity import perplexity
from siftune.recipe.schema import Recipe, compares, rate_of
from siftune.records.rows import Read, read_rows
from siftune.train.build import NONE, build
from siftune.train.callbacks import StepsTold
from siftune.train.prepare import ModelSource, Source, prepare, refuse_read, trained_and_held_out
from siftune.train.rates.folder import LRFolder
from siftune.train.rates.grid import Grid, LRRun, rate_text, recipes_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LRSweep:
    """A sweep that may begin or go on: all that can be refused without the model has been looked at."""

    grid: Grid  # what it tries
    recipes: Mapping[str, Recipe]  # method -> its recipe, resolved
    folder: LRFolder  # where its results go, with those of earlier calls
    source: Source
    rows: Mapping[str, Sequence[Row]]  # `train`, `eval` and, where a method compares with them, `support`

    def missing(self) -> list[tuple[str, float, int]]:
        """Method, rate and seed of the runs that are still to do."""
        done = {run.cell for run in self.folder.runs()}
        return [cell for cell in self.grid.cells() if cell not in done]


def open_sweep(
    recipe: Recipe, grid: Grid, out: str | Path, source_of: Callable[[str], Source] = ModelSource
) -> LRSweep:
    """Check a sweep, and read its rows and what its folder has of it: a new one, or one of the same recipe and rows.

    Raises:
        InputError: A method cannot run with the recipe, or recipe or rows are not those of the folder.
    """
    if launch_size() > 1:
        raise RecipeError("a sweep runs in one process: start it without torchrun or accelerate launch")
    recipes = recipes_of(recipe, grid.methods)
    source = source_of(recipe.model)
    recipes = {method: source.settle(one) for method, one in recipes.items()}
    folder = LRFolder(out)
    with folder.taken_back():
        folder.refuse_others(recipes)
        widest = next(filter(compares, recipes.values()), recipes[grid.methods[0]])
        read = read_rows(widest)
        refuse_read(widest, read, source.tokenizer)
        rows = read.parts
        folder.refuse_other_rows(_digests(rows))
    if both := trained_and_held_out(rows):
        logger.warning(
            "%d of %d held-out rows are training rows too: of these the loss tells how well they are learned by heart",
            both,
            len(rows["eval"]),
        )
    return LRSweep(grid, recipes, folder, source, rows)


def run_missing(sweep: LRSweep, progress: Progress) -> Iterator[LRRun]:
    """Do the runs that are missing, and yield each when it is in the folder.

    Before the first of a method, one step is tried with every method that is new here, so that none is refused when
    others have run for hours.

    Raises:
        InputError: A method cannot train this model.
    """
    missing = sweep.missing()
    if not missing:
        return
    with sweep.folder.taken_back():
        data = _begin(sweep, progress)
    for method in dict.fromkeys(method for method, _, _ in missing):
        if not sweep.folder.has(method):
            _try(sweep, method, data, progress)
    for number, (method, rate, seed) in enumerate(missing, 1):
        stage = f"run {number} of {len(missing)}: {method} at {rate_text(rate)}"
        recipe = replace(sweep.recipes[method], lr=rate, seed=seed)
        run = _run(sweep.source, recipe, data, partial(progress, stage))
        gc.collect()  # the Trainer refers to itself: without this two models would be in memory
        sweep.folder.append(run)
        yield run


def _begin(sweep: LRSweep, progress: Progress) -> Mapping[str, Dataset]:
    """Tokenise the rows, and measure the base model where that has not been done."""
    recipe = sweep.recipes[sweep.grid.methods[0]]
    progress("loading the model", 0, 0)
    model, tokenizer = sweep.source.load(recipe.dtype, recipe.quantize)
    data = prepare(recipe, tokenizer, Read(sweep.rows), progress).data
    if not sweep.folder.begun:
        progress("measuring the base model", 0, 0)
        if torch.accelerator.is_available():
            model = model.to(torch.accelerator.current_accelerator())
        loss = _heldout_loss(model, data["eval"], recipe.batch_size)
        if not math.isfinite(loss):
            raise TrainingError(
                f"The held-out loss of {recipe.model} is {loss}: look for broken rows in {recipe.eval or 'its share'}"
            )
    else:
        loss = sweep.folder.base_loss
    sweep.folder.begin(loss, _digests(sweep.rows))
    return data


def _try(sweep: LRSweep, method: str, data: Mapping[str, Dataset], progress: Progress) -> None:
    """Train one step, and note that the method can."""
    progress(f"trying a step of {method}", 0, 0)
    _tuned(sweep.source, replace(sweep.recipes[method], steps=1, lr=sweep.grid.rates[0]), data, lambda *_: None)
    gc.collect()
    sweep.folder.add(sweep.recipes[method])


def _run(source: Source, recipe: Recipe, data: Mapping[str, Dataset], steps: Callable[[int, int], None]) -> LRRun:
    """Train and measure; a loss that is not finite is a result."""
    started = time.monotonic()
    done, heldout, train, diverged = 0, math.nan, math.nan, None

    def count(step: int, total: int) -> None:
        nonlocal done
        done = step
        steps(step, total)

    try:
        model, train = _tuned(source, recipe, data, count)
        heldout = _heldout_loss(model, data["eval"], recipe.batch_size)
        if not math.isfinite(heldout):
            diverged = f"The held-out loss is {heldout} after step {done}"
    except TrainingError as error:
        diverged = str(error).partition(";")[0]  # what follows is advice on one rate
    return LRRun(
        method=recipe.method,
        lr=rate_of(recipe),
        seed=recipe.seed,
        heldout_loss=None if diverged else heldout,
        train_loss=None if diverged else train,
        steps=done,
        seconds=round(time.monotonic() - started, 2),
        diverged=diverged,
    )


def _tuned(
    source: Source, recipe: Recipe, data: Mapping[str, Dataset], steps: Callable[[int, int], None]
) -> tuple[nn.Module, float]:
    """Train as `train` does, but for what a run leaves behind.

    Returns:
        The tuned model, methods and casts taken off, and the mean training loss of the last tenth of the steps.
    """
    quiet = replace(
        recipe, eval=None, eval_share=0.0, eval_every=None, patience=None, save_every=None, log_every=1,
        report_to=(NONE,),
    )  # fmt: skip
    parts = {"train", *(["support"] if compares(recipe) else [])}
    model, tokenizer = source.load(recipe.dtype, recipe.quantize)
    with tempfile.TemporaryDirectory(prefix="siftune-lr-") as folder:
        used = {name: data[name] for name in parts}
        # a rate that breaks a step is a result
        built = build(quiet, model, tokenizer, used, Path(folder), [StepsTold(steps)], bad_steps=0)
        try:
            built.trainer.train()
        finally:
            built.release()
    losses = [entry["loss"] for entry in built.trainer.state.log_history if "loss" in entry]
    return built.trainer.model, fmean(losses[-max(1, len(losses) // 10) :])


def _heldout_loss(model: nn.Module, rows: Dataset, batch_size: int) -> float:
    """Nats per label token, over all tokens alike; the Trainer's own figure hangs on how rows fall into batches."""
    pairs = list(zip(rows["input_ids"], rows["labels"], strict=True))
    result = perplexity(model, pairs, batch_size)
    return float(result.nll.sum() / result.tokens.sum())


def _digests(rows: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """A digest of each part's rows: what is read, what is learned and how much it counts, in their order."""
    return {name: hashlib.sha256("\n".join(map(_told, part)).encode()).hexdigest()[:16] for name, part in rows.items()}


def _told(row: Row) -> str:
    return repr((row.prompt, row.completion, *(() if row.weight == 1 else (row.weight,))))
