"""`siftune reproduce`: a paper's evaluation, from its rows to its table."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional

from siftune.errors import RecipeError
from siftune.settings import COUNT, check_fields

if TYPE_CHECKING:
    from siftune.reproduce.cells import Reproduction
    from siftune.reproduce.protocol import Protocol


@dataclass
class Options:
    """Reproduce a paper's table: rates, runs, answers, and the paper's figures beside one's own.

    NAME is a suite and a model: commonsense or math, with llama-7b, llama-13b, llama3-8b, gpt-j-6b, opt-1.3b or
    opt-6.7b, such as commonsense-llama-7b. Learning rates are found on held-out rows first, for each method. A run
    that was cut off goes on when the command is called again with the same --out, where methods and seeds can be added.
    """

    name: Positional[str]
    """Which table: see above."""
    methods: str = "dense"
    """Methods, with commas between, such as dense,ist,gast."""
    seeds: str = "0"
    """Seeds, with commas between."""
    data: str = "hub"
    """Folder with the rows of LLM-Adapters; or hub, where there is a network."""
    out: str | None = None
    """Folder for everything; runs/NAME if not given."""
    tasks: str | None = None
    """Tasks to ask, with commas between; all of the suite if not given."""
    rates: str | None = None
    """Learning rates to try, with commas between; one is taken without a sweep; the suite's if not given."""
    sweep_steps: Annotated[int | None, COUNT] = None
    """Steps of each run of the sweep; as many as a run has if not given, since the best rate hangs on them."""
    masked: bool = False
    """Learn the answers alone; the papers' code learns the prompts too."""
    model: str | None = None
    """Another model in the place of the paper's: a folder, hub id or smollm2."""
    recipe: str | None = None
    """Recipe file (.yaml) whose lines stand in the place of the paper's, such as adapter or checkpointing."""
    limit: Annotated[int | None, COUNT] = None
    """Train on so many of the rows, drawn evenly."""
    questions: Annotated[int | None, COUNT] = None
    """Ask only the first so many questions of each task."""
    batch_size: Annotated[int, COUNT] = 16
    """Rows in a forward pass when questions are asked; training takes the recipe's."""
    dry_run: bool = False
    """Train nothing: tell parameters, steps, and an estimate of time and memory, from the real model's shape."""
    gpu: Literal["a100-40gb", "a100-80gb", "h100", "rtx4090"] = "a100-80gb"
    """With dry_run: the GPU that time and memory are reckoned for."""


def run(options: Options) -> dict[str, Any]:
    """Do what is missing, and print the tables."""
    check_fields(options, ["limit", "questions", "sweep_steps", "batch_size"], "--")
    from siftune.reproduce.protocol import protocol_of

    protocol = protocol_of(options.name, *([options.recipe] if options.recipe else []))
    _refuse_lines(options.recipe)
    options = replace(options, limit=options.limit or protocol.recipe.limit)
    if options.dry_run and options.model is not None:
        raise RecipeError("--dry-run reckons with the paper's model, not with that of --model: leave one of them out")
    changed = replace(
        protocol.recipe, completion_only=options.masked or protocol.recipe.completion_only,
        model=options.model or protocol.recipe.model, limit=None,
    )  # fmt: skip
    protocol = replace(protocol, recipe=changed)
    return _told(options, protocol) if options.dry_run else _work(options, _reproduction(options, protocol))


# what a protocol sets for each run -> where it is given
_GIVEN = {
    "method": "by --methods", "lr": "by --rates", "seed": "by --seeds", "out": "by --out", "train": "by --data",
    "eval": "by the protocol", "quantize": "nowhere: questions are asked of a base that is not quantised",
}  # fmt: skip


def _refuse_lines(recipe: str | None) -> None:
    """Refuse lines of a recipe file that would be of no effect."""
    from siftune.config import Recipe
    from siftune.recipe_file import load_recipe

    own: Recipe = load_recipe(*([recipe] if recipe else []))
    for name, where in _GIVEN.items():
        if getattr(own, name) != getattr(Recipe(), name):
            raise RecipeError(f"{recipe}: {name} is set {where}: leave it out of the file")


def _tasks(options: Options, protocol: "Protocol") -> tuple[str, ...]:
    """The tasks that are asked, in the suite's order."""
    known = protocol.suite.tasks
    named = known if options.tasks is None else tuple(word.strip() for word in options.tasks.split(",") if word.strip())
    unknown = [name for name in named if name not in known]
    if unknown or not named:
        raise RecipeError(f"--tasks names {unknown[0] if unknown else 'none'}; {options.name} has {', '.join(known)}")
    return tuple(task for task in known if task in named)


def _reproduction(options: Options, protocol: "Protocol") -> "Reproduction":
    from siftune.reproduce.cells import Reproduction
    from siftune.trainer.lr_grid import grid_of

    rates = options.rates or ",".join(map(str, protocol.suite.rates))
    grid = grid_of(protocol.recipe, options.methods, rates, options.seeds)
    out = Path(options.out or f"runs/{options.name}").expanduser()
    return Reproduction(protocol, _tasks(options, protocol), grid, out, options.sweep_steps, options.batch_size)


def _work(options: Options, work: "Reproduction") -> dict[str, Any]:
    import json
    from contextlib import nullcontext

    from rich.console import Console

    from siftune.files import write_beside
    from siftune.recipe_file import recipe_values
    from siftune.report.table import markdown_table, print_table
    from siftune.reproduce.protocol import sources
    from siftune.reproduce.rows import HUB, prepare_files, trained_on
    from siftune.reproduce.table import results, tables
    from siftune.stages import stages

    console, started = Console(stderr=True, highlight=False, soft_wrap=True), time.monotonic()
    settings = {key: value for key, value in recipe_values(work.protocol.recipe).items() if key not in ("lr", "seed")}
    data = options.data if options.data == HUB else str(Path(options.data).expanduser().absolute())
    about: dict[str, Any] = {"name": options.name, "data": data, "limit": options.limit, "questions": options.questions}
    if options.data == HUB or Path(data).is_dir():  # a folder that is gone is needed no more where its rows are here
        about["rows of"] = trained_on(work.protocol.suite, work.tasks, options.data)
    work.begin(settings | about)
    prepare_files(work.protocol.suite, work.tasks, options.data, work.out / "data", options.limit, options.questions)
    with stages(console) if console.is_terminal else nullcontext(lambda *_: None) as progress:
        for cell in work.work(console, progress):
            console.print(f"{cell.folder.name} is done", markup=False)
    found, rates = results(work), {cell.method: cell.rate() for cell in work.cells()}
    made, shown = tables(work, found), Console(highlight=False, soft_wrap=True)
    for table in made:
        print_table(table, shown)
    notes = [
        f"{name}: {words}" for name, words in sources().items() if any(p.source == name for p in work.protocol.printed)
    ]
    notes.append("learning rates: " + ", ".join(f"{method} {rate:g}" for method, rate in rates.items() if rate))
    shown.print("\n".join(notes), markup=False)
    page = "\n\n".join(f"## {table.title}\n\n{markdown_table(table)}" for table in made)
    for name, text in (
        ("table.md", page + "\n\n" + "\n".join(notes)),
        ("results.json", json.dumps({**found, "rates": rates}, indent=2)),
    ):
        with write_beside(work.out / name) as [beside]:
            beside.write_text(text + "\n", encoding="utf-8")
    console.print(f"done in {time.monotonic() - started:.0f} s: tables and runs in {work.out}", markup=False)
    return {"folder": work.out, "results": found, "rates": rates}


def _told(options: Options, protocol: "Protocol") -> dict[str, Any]:
    """What runs would take, by method, and every setting of theirs."""
    from rich.console import Console

    from siftune.recipe_file import recipe_to_yaml
    from siftune.report.table import Table, print_table
    from siftune.reproduce.rows import HUB, training_count
    from siftune.reproduce.shape import GPUS, OVER_FLOOR, shape_of

    work = _reproduction(options, protocol)
    rows = training_count(protocol.suite, work.tasks, options.data or HUB, options.limit)
    shape = shape_of(protocol, rows)
    console = Console(highlight=False, soft_wrap=True)
    console.print(recipe_to_yaml(protocol.recipe).rstrip(), markup=False)
    console.print(
        f"\n{shape.trainable:,} of {shape.parameters:,} parameters train; {shape.steps:,} steps of "
        f"{protocol.recipe.batch_size * protocol.recipe.accumulate} rows, {rows:,} rows",
        markup=False,
    )
    methods = {
        name: {"seconds": shape.seconds(options.gpu, name), "bytes": shape.bytes(name)} for name in work.grid.methods
    }
    cells = [[name, _hours(one["seconds"]), _gigabytes(one["bytes"])] for name, one in methods.items()]
    title = f"estimated for one run on {options.gpu} of {GPUS[options.gpu][1] / 1e9:.0f} GB"
    print_table(Table(["method", "time", "memory"], cells, title), console)
    console.print(
        f"reckoned, not measured: operations on the meta device, {OVER_FLOOR} times as long as the GPU's makers state, "
        "and the methods' ratios of the README, which are of SmolLM2 on processors; the sweep comes on top",
        markup=False,
    )
    return {
        "parameters": shape.parameters, "trainable": shape.trainable, "steps": shape.steps, "rows": rows,
        "methods": methods,
    }  # fmt: skip


def _hours(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{seconds / 3600:.1f} h"


def _gigabytes(count: float | None) -> str:
    return "not measured" if count is None else f"{count / 1e9:.0f} GB"
