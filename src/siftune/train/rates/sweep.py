"""Learning-rate sweeps: every method at every rate, trained as by `train`, measured on held-out rows.

FOLDER/
start.json      the settings and digests of rows that results depend on, and the base model's held-out loss
METHOD.yaml     the recipe of each method, for `siftune train`; its `lr` is the recipe's, not the best
results.jsonl   a line for each finished run
results.json, results.md, …   written by `siftune.report.rates`

Every run loads the model again and discards it afterwards: no adapter has to be removed bit for bit, layers with
trainable weights need no copy, and loading is cheap compared with training.
"""

import gc
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from datasets import Dataset
from torch import nn

from siftune.base.environment import launch_size
from siftune.base.errors import DataError, RecipeError, TrainingError
from siftune.base.files import Progress
from siftune.base.work_folder import WorkFolder
from siftune.data.rows import Row
from siftune.evaluate.likelihood import perplexity
from siftune.recipe.checks import NO_TRACKER
from siftune.recipe.read import anchored, recipe_to_yaml
from siftune.recipe.schema import Recipe, compares, rate_of
from siftune.recipe.training_rows import Read, digest_of
from siftune.train.build import build
from siftune.train.callbacks import StepProgress
from siftune.train.guards.non_finite import BrokenSteps
from siftune.train.prepare import NAMED, bad_lines, trained_and_held_out
from siftune.train.rates.grid import RECORD, Grid, LRRun, facts_of, rate_text, recipes_of
from siftune.train.session import open_session, read_session, settled
from siftune.train.source import ModelSource, Source

logger = logging.getLogger(__name__)

_RESULTS, _BASE_LOSS = "results.jsonl", "heldout_loss"


class LRFolder(WorkFolder):
    """The folder of a sweep."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path, RECORD, "*.yaml", _RESULTS)

    @property
    def base_loss(self) -> float:
        """Held-out loss of the base model, in nats per label token; available once the first run begins."""
        return float(self.state[_BASE_LOSS])

    def runs(self) -> list[LRRun]:
        """Finished runs in the order of their ends; of two in one cell the later."""
        runs = self.lines(_RESULTS, LRRun)
        return list({run.cell: run for run in runs}.values())


@dataclass(frozen=True)
class LRSweep:
    """A sweep that is checked as far as possible without the model."""

    grid: Grid
    recipes: Mapping[str, Recipe]  # method -> its recipe, resolved
    folder: LRFolder  # results, those of earlier calls included
    source: Source
    rows: Mapping[str, Sequence[Row]]  # `train`, `eval` and, if a method compares with them, `support`
    bad: Sequence[DataError] = ()  # faults of rows that are left out

    def missing(self) -> list[tuple[str, float, int]]:
        """Method, rate and seed of the runs that remain."""
        done = {run.cell for run in self.folder.runs()}
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
    rows = read.parts
    if both := trained_and_held_out(rows):
        logger.warning(
            "%d of %d held-out rows are training rows too: their loss measures memorization", both, len(rows["eval"])
        )
    digests = {f"the {name} rows": digest_of(part) for name, part in rows.items()}
    folder = LRFolder(out).begin({**facts_of(recipe, recipes), **digests, **source.identity})
    return LRSweep(grid, recipes, folder, source, rows, read.bad)


def run_missing(sweep: LRSweep, progress: Progress) -> Iterator[LRRun]:
    """Do the remaining runs, and yield each once it is in the folder.

    Before a method's first run, one step is tried with every new method, so that none is refused hours later.

    Raises:
        InputError: A method cannot train this model.
    """
    missing, folder = sweep.missing(), sweep.folder
    with folder:
        if not missing:
            return
        data = _begin(sweep, progress)
        for method in dict.fromkeys(method for method, _, _ in missing):
            if not (folder.path / f"{method}.yaml").exists():
                progress(f"trying a step of {method}", 0, 0)
                _tuned(sweep.source, replace(sweep.recipes[method], steps=1, lr=sweep.grid.rates[0]), data)
                gc.collect()
                folder.write(f"{method}.yaml", recipe_to_yaml(sweep.recipes[method]))
    with folder.begin({}):  # whose results now stay whatever happens
        for number, (method, rate, seed) in enumerate(missing, 1):
            stage = f"run {number} of {len(missing)}: {method} at {rate_text(rate)}"
            recipe = replace(sweep.recipes[method], lr=rate, seed=seed)
            run = _run(sweep.source, recipe, data, partial(progress, stage))
            gc.collect()  # the Trainer refers to itself: without this two models would be in memory
            folder.append(_RESULTS, asdict(run))
            yield run


def _begin(sweep: LRSweep, progress: Progress) -> Mapping[str, Dataset]:
    """Tokenise the rows, and evaluate the base model if that has not been done."""
    recipe = sweep.recipes[sweep.grid.methods[0]]
    progress("loading the model", 0, 0)
    session = open_session(recipe, sweep.source, Read(sweep.rows, sweep.bad), nullcontext(progress))
    for line in bad_lines(session.prepared, NAMED):
        logger.warning("%s", line)
    model, data = session.model, session.data
    if _BASE_LOSS in sweep.folder.state:
        return data
    progress("evaluating the base model", 0, 0)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    loss = _heldout_loss(model, data["eval"], recipe.batch_size)
    if not math.isfinite(loss):
        raise TrainingError(
            f"The held-out loss of {recipe.model} is {loss}: check the rows of {recipe.eval or 'eval_share'}"
        )
    sweep.folder.set_state(**{_BASE_LOSS: loss})
    return data


def _run(source: Source, recipe: Recipe, data: Mapping[str, Dataset], steps: Callable[[int, int], None]) -> LRRun:
    """Train and evaluate; a loss that is not finite is a result."""
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
        diverged = str(error).partition(";")[0]  # the rest is advice for a single run
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
    source: Source,
    recipe: Recipe,
    data: Mapping[str, Dataset],
    steps: Callable[[int, int], None] = lambda *_: None,
) -> tuple[nn.Module, float]:
    """Train as by `train`, without a run folder.

    Returns:
        The tuned model, without methods and casts, and the mean training loss of the last tenth of the steps.
    """
    quiet = replace(
        recipe, eval=None, eval_share=0.0, eval_every=None, patience=None, save_every=None, log_every=1,
        report_to=(NO_TRACKER,),
    )  # fmt: skip
    parts = {"train", *(["support"] if compares(recipe) else []), *({"keep"} & data.keys())}
    model, tokenizer = source.load(recipe.dtype, recipe.quantize)
    with tempfile.TemporaryDirectory(prefix="siftune-lr-") as folder:
        used = {name: data[name] for name in parts}
        # a rate that breaks a step is a result
        built = build(quiet, model, tokenizer, used, Path(folder), [StepProgress(steps)], BrokenSteps(0))
        try:
            built.trainer.train()
        finally:
            built.release()
    losses = [entry["loss"] for entry in built.trainer.state.log_history if "loss" in entry]
    return built.trainer.model, fmean(losses[-max(1, len(losses) // 10) :])


def _heldout_loss(model: nn.Module, rows: Dataset, batch_size: int) -> float:
    """Nats per label token, every token with the same weight; the Trainer's figure depends on how rows are batched."""
    pairs = list(zip(rows["input_ids"], rows["labels"], strict=True))
    result = perplexity(model, pairs, batch_size)
    return float(result.nll.sum() / result.tokens.sum())
