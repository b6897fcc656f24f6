"""`siftune find-lr`: find the learning rate of each method, on held-out rows."""

import shlex
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass

from siftune.base.settings import CONFIG
from siftune.base.text import counted
from siftune.base.work_folder import WorkFolder
from siftune.cli.sources import source_of
from siftune.recipe.schema import Recipe, new_folder
from siftune.train.rates.grid import RECORD, grid_of, recipes_of

if TYPE_CHECKING:
    from rich.console import Console

    from siftune.train.rates.grid import LRRun
    from siftune.train.rates.sweep import LRSweep


@dataclass(config=CONFIG)
class Options(Recipe):
    """Try learning rates: train with each method at each rate, and measure the loss on held-out rows.

    Takes recipes and flags of siftune train; eval or eval_share must be given. Every run trains as that would, with the
    recipe's steps or epochs, and leaves nothing but its figures: no adapter, no checkpoint, no tracker. An interrupted
    sweep continues if it is called again with the same --out. Further methods, rates and seeds can be added.
    """

    methods: str | None = None
    """Methods to try, with commas between, such as dense,gast,ist; the recipe's if not given."""
    rates: str | None = None
    """Peak learning rates, with commas between; a quarter, half, once, twice and four times lr if not given."""
    seeds: str | None = None
    """Seeds to try each with, with commas between; the recipe's seed if not given."""
    out: str | None = None
    """Folder for results and table; runs/DATE-find-lr if not given."""


def run(options: Options) -> dict[str, Any]:
    """Train and measure what is missing; write and show the table."""
    started = time.monotonic()
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    grid = grid_of(recipe, options.methods, options.rates, options.seeds)
    recipes_of(recipe, grid.methods)  # checks them; this and the folder, before torch is imported
    if options.out is not None:
        WorkFolder(options.out, RECORD).refuse_others()
    from siftune.base.stages import text_console
    from siftune.report.rates import advice, before, table, to_dict, to_markdown
    from siftune.report.table import print_table
    from siftune.train.rates.sweep import open_sweep

    console = text_console(stderr=True)
    sweep = open_sweep(recipe, grid, options.out or new_folder("find-lr"), source_of)
    _work_off(sweep, console)
    result, path = sweep.result, sweep.folder.path
    assert result is not None
    runs, base = result.runs, result.base_heldout_loss
    sweep.folder.write("rates.md", to_markdown(result))
    shown = text_console()
    print_table(table(runs), shown)
    shown.print("\n".join([before(base), "", *advice(runs, base)]), markup=False)
    seconds, recipe_of = round(time.monotonic() - started, 1), shlex.quote(f"{path}/METHOD.yaml")
    console.print(
        f"done in {seconds:.0f} s: in {path} are the table rates.md and a recipe for each method, at the rate of your "
        "settings\n"
        f"next: `siftune train {recipe_of} --lr RATE --out RUN`",
        markup=False,
    )
    return {"folder": path, **to_dict(result), "seconds": seconds}


def _work_off(sweep: "LRSweep", console: "Console") -> None:
    """Do the runs that are missing, with a line for each."""
    from contextlib import nullcontext

    from siftune.base.stages import stages
    from siftune.train.rates.sweep import run_missing

    count, path = len(sweep.missing()), sweep.folder.path
    done, seconds = 0, 0.0
    console.print(f"{counted(count, 'run')} to do, {len(sweep.runs())} done; results in {path}", markup=False)
    try:
        # elsewhere than on a terminal a line for each run is enough
        with stages(console) if console.is_terminal else nullcontext(lambda *_: None) as progress:
            for run in run_missing(sweep, progress):
                done, seconds = done + 1, seconds + run.seconds
                console.print(_line(run, done, count, seconds), markup=False)
    except KeyboardInterrupt as stop:
        finished = counted(len(sweep.runs()), "finished run")
        stop.add_note(f"{finished} in {path}; the same command with --out {path} continues")
        raise


def _line(run: "LRRun", done: int, count: int, seconds: float) -> str:
    """The result of a run, and how long the others will take, if all take alike."""
    from siftune.base.text import duration
    from siftune.train.rates.grid import rate_text

    outcome = run.diverged and f"diverged: {run.diverged}"
    if run.heldout_loss is not None and run.train_loss is not None:
        outcome = f"held-out loss {run.heldout_loss:.4f}, training loss {run.train_loss:.4f}"
    left = f", {duration(seconds / done * (count - done))} left" if done < count else ""
    job = f"{run.method} at {rate_text(run.lr)}, seed {run.seed}"
    return f"{done}/{count}  {job}: {outcome}  ({run.seconds:.0f} s{left})"
