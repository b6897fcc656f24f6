"""Learning-rate sweeps: a training for every method, rate and seed, measured on held-out rows.

FOLDER/
rates.json    the settings and digests of rows that results depend on, the base model's held-out loss, the finished runs
METHOD.yaml   the recipe of each method with a finished run, for `siftune train`; its `lr` is the recipe's, not the best
rates.md      the table of `siftune.report.rates`

Every run loads the model again and discards it afterwards: no adapter has to be removed bit for bit, layers with
trainable weights need no copy, and loading is cheap compared with training.
"""

import gc
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from datasets import Dataset
from torch import nn

from siftune.base.environment import launch_size
from siftune.base.errors import RecipeError, TrainingError
from siftune.base.files import Progress
from siftune.base.work_folder import WorkFolder
from siftune.evaluate.likelihood import perplexity
from siftune.recipe.checks import NO_TRACKER
from siftune.recipe.read import anchored, recipe_to_yaml
from siftune.recipe.schema import Recipe, compares, rate_of
from siftune.recipe.training_rows import Read, digest_of
from siftune.train.build import build
from siftune.train.callbacks import StepProgress
from siftune.train.guards.non_finite import BrokenSteps
from siftune.train.prepare import NAMED, bad_lines, trained_and_held_out
from siftune.train.rates.grid import RECORD, Grid, LRResult, LRRun, facts_of, rate_text, recipes_of, result_of
from siftune.train.session import open_session, read_session, settled
from siftune.train.source import ModelSource, Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LRSweep:
    """A sweep that is checked as far as possible without the model."""

    grid: Grid
    recipes: Mapping[str, Recipe]  # method -> its recipe, resolved
    folder: WorkFolder  # results, those of earlier calls included
    source: Source
    read: Read  # rows `train`, `eval` and, if a method compares with them, `support`

    @property
    def result(self) -> LRResult | None:
        """The base model's loss and the finished runs; None before the first."""
        return result_of(self.folder.state)

    def runs(self) -> list[LRRun]:
        """Finished runs in the order of their ends."""
        result = self.result
        return result.runs if result else []

    def missing(self) -> list[tuple[str, float, int]]:
        """Method, rate and seed of the runs that remain."""
        done = {run.cell for run in self.runs()}
        return [cell for cell in self.grid.cells() if cell not in done]


def open_sweep(
    recipe: Recipe, grid: Grid, out: str | Path, source_of: Callable[[str], Source] = ModelSource
) -> LRSweep:
    """Check a sweep and read its rows; a folder with results continues if recipe and rows are the same.

    Raises:
        InputError: A method cannot run with the recipe, or recipe or rows are not those of the folder.
    """
    if launch_size() > 1:
        raise RecipeError("a sweep runs in one process: start it without torchrun or accelerate launch")
    sessions = {method: settled(one, source_of) for method, one in recipes_of(recipe, grid.methods).items()}
    recipes = {method: replace(anchored(one), out=None) for method, (one, _) in sessions.items()}
    _, source = sessions[grid.methods[0]]
    widest = next(filter(compares, recipes.values()), recipes[grid.methods[0]])
    read = read_session(widest, source)
    if both := trained_and_held_out(read.parts):
        count = len(read.parts["eval"])
        logger.warning("%d of %d held-out rows are training rows too: their loss measures memorization", both, count)
    digests = {f"the {name} rows": digest_of(part) for name, part in read.parts.items()}
    folder = WorkFolder(out, RECORD, "*.yaml").begin({**facts_of(recipe, recipes), **digests, **source.identity})
    return LRSweep(grid, recipes, folder, source, read)


def run_missing(sweep: LRSweep, progress: Progress) -> Iterator[LRRun]:
    """Do the remaining runs, and yield each once it is in the folder.

    Raises:
        InputError: A method cannot train this model.
    """
    missing, data, base = sweep.missing(), None, math.nan
    with sweep.folder as folder:  # ends its lock
        for number, (method, rate, seed) in enumerate(missing, 1):
            with folder.begin({}):  # a folder is removed if its first run is refused, but not if a later one is
                if data is None:
                    data, base = _begin(sweep, progress)
                stage = f"run {number} of {len(missing)}: {method} at {rate_text(rate)}"
                recipe = replace(sweep.recipes[method], lr=rate, seed=seed)
                run = _run(sweep.source, recipe, data, partial(progress, stage))
                gc.collect()  # the Trainer refers to itself: without this two models would be in memory
                folder.write(f"{method}.yaml", recipe_to_yaml(sweep.recipes[method]))  # marks a folder with runs
                folder.set_state(**asdict(LRResult(base, [*sweep.runs(), run])))
            yield run


def _begin(sweep: LRSweep, progress: Progress) -> tuple[Mapping[str, Dataset], float]:
    """Tokenise the rows; return them and the base model's held-out loss, evaluated unless the folder has it."""
    recipe = sweep.recipes[sweep.grid.methods[0]]
    progress("loading the model", 0, 0)
    session = open_session(recipe, sweep.source, sweep.read, nullcontext(progress))
    for line in bad_lines(session.prepared, NAMED):
        logger.warning("%s", line)
    if before := sweep.result:
        return session.data, before.base_heldout_loss
    progress("evaluating the base model", 0, 0)
    model = session.model
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    loss = _heldout_loss(model, session.data["eval"], recipe.batch_size)
    if not math.isfinite(loss):
        raise TrainingError(
            f"the held-out loss of {recipe.model} is {loss}: check the rows of {recipe.eval or 'eval_share'}"
        )
    return session.data, loss


def _run(source: Source, recipe: Recipe, data: Mapping[str, Dataset], steps: Callable[[int, int], None]) -> LRRun:
    """Train as `train` does, without a run folder, and evaluate; a loss that is not finite is a result."""
    started = time.monotonic()
    quiet = replace(
        recipe, eval=None, eval_share=0.0, eval_every=None, patience=None, save_every=None, log_every=1,
        report_to=(NO_TRACKER,),
    )  # fmt: skip
    parts = {"train", *(["support"] if compares(recipe) else []), *({"keep"} & data.keys())}
    used = {name: data[name] for name in parts}
    model, tokenizer = source.load(recipe.dtype, recipe.quantize)
    heldout, diverged = math.nan, None
    with tempfile.TemporaryDirectory(prefix="siftune-lr-") as folder:
        # a rate that breaks a step is a result
        built = build(quiet, model, tokenizer, used, Path(folder), [StepProgress(steps)], BrokenSteps(0))
        try:
            built.trainer.train()
        except TrainingError as error:
            diverged = str(error).partition(";")[0]  # the rest is advice for a single run
        finally:
            built.release()
    trainer = built.trainer
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if diverged is None:
        heldout = _heldout_loss(trainer.model, data["eval"], recipe.batch_size)
        if not math.isfinite(heldout):
            diverged = f"the held-out loss is {heldout} after step {trainer.state.global_step}"
    return LRRun(
        method=recipe.method,
        lr=rate_of(recipe),
        seed=recipe.seed,
        heldout_loss=None if diverged else heldout,
        train_loss=None if diverged else fmean(losses[-max(1, len(losses) // 10) :]),
        steps=trainer.state.global_step,
        seconds=round(time.monotonic() - started, 2),
        diverged=diverged,
    )


def _heldout_loss(model: nn.Module, rows: Dataset, batch_size: int) -> float:
    """Nats per label token, every token with the same weight; the Trainer's figure depends on how rows are batched."""
    pairs = list(zip(rows["input_ids"], rows["labels"], strict=True))
    result = perplexity(model, pairs, batch_size)
    return float(result.nll.sum() / result.tokens.sum())
