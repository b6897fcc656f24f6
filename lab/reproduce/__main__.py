"""`python -m lab.reproduce`: the commonsense suite on a model, from its rows to its table."""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic.dataclasses import dataclass

from lab.reproduce.questions import Wording
from siftune.base.environment import settle_threads
from siftune.base.errors import RecipeError, SiftuneError
from siftune.base.settings import CONFIG, Count, Validated
from siftune.cli.options import Flag, parse

if TYPE_CHECKING:
    from rich.console import Console

    from lab.reproduce.runs import Group, Reproduction
    from siftune.recipe.schema import Recipe

_RECIPE = Path(__file__).parent / "commonsense.yaml"


@dataclass(config=CONFIG)
class Options(Validated):
    """Reproduce the papers' table of commonsense tasks on another model: rates, runs and answers.

    Learning rates are found on held-out rows first, for each method. An interrupted call resumes if the command is
    called again with the same --out, where methods, adapters and seeds can be added.
    """

    model: Annotated[str, Flag(positional=True)]
    """smollm2, a model of lab.models such as qwen0.5b, a folder or a hub id."""
    data: str
    """Folder with the rows (lab/README.md)."""
    methods: str = "dense"
    """Methods, with commas between, such as dense,ist,gast."""
    adapters: str = "lora"
    """Adapter types, with commas between, such as lora,dora,series,parallel."""
    prompts: str = "learned"
    """learned, as the papers' code has it, masked, or both with a comma between."""
    answers: Wording = "names"
    """names (Answer1), as the papers have it, letters (A), or texts, for small models: options are not listed, and an
    answer is the text of the correct one."""
    seeds: str = "0"
    """Seeds, with commas between."""
    out: str | None = None
    """Folder for everything; runs/MODEL if not given."""
    tasks: str | None = None
    """Tasks, with commas between; all if not given."""
    metrics: str | None = None
    """Metrics, with commas between: generated (the option in the model's answer), likeliest (by log-likelihood), nats
    (of the correct answer); all if not given."""
    rates: str = "5e-4,1e-3,2e-3"
    """Learning rates to try, with commas between; a single one is used without a sweep."""
    sweep_steps: Count | None = None
    """Steps of each run of the sweep; those of a run if not given, since the best rate depends on them."""
    recipe: str | None = None
    """Recipe file (.yaml) that overrides settings of commonsense.yaml, such as steps or checkpointing."""
    limit: Count | None = None
    """Number of training rows, drawn evenly; all if not given."""
    questions: Count | None = None
    """Number of questions of each task, the first ones; all if not given."""
    batch_size: Count = 16
    """Rows in a forward pass of evaluation; training uses the recipe's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 if the user's input is at fault."""
    settle_threads()
    try:
        run(parse(Options, sys.argv[1:] if argv is None else argv, "python -m lab.reproduce"))
    except SiftuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: Options) -> None:
    """Do what is missing, and print the tables."""
    from rich.console import Console

    from lab.reproduce.questions import prepare_files
    from siftune.base.stages import stages

    console, started = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True), time.monotonic()
    work, data = _reproduction(options), Path(options.data).expanduser().absolute()
    work.begin(_about(options, work, data))
    prepare_files(work.tasks, data, work.out / "data", options.limit, options.questions, options.answers)
    try:
        with stages(console) if console.is_terminal else nullcontext(lambda *_: None) as progress:
            for name in work.work(console, progress):
                console.print(f"{name} is done", markup=False)
    except BaseException:
        _report(options.model, work, None)  # of what is there
        raise
    _report(options.model, work, Console(highlight=False, emoji=False, soft_wrap=True))
    console.print(f"done in {time.monotonic() - started:.0f} s: tables and runs in {work.out}", markup=False)


# settings of each run -> the option that sets them
_SET_ELSEWHERE = {
    "model": "by MODEL", "method": "by --methods", "lr": "by --rates", "seed": "by --seeds", "out": "by --out",
    "train": "by --data", "eval": "by --data", "limit": "by --limit", "adapter": "by --adapters",
    "completion_only": "by --prompts", "quantize": "nowhere: questions are asked of a base that is not quantised",
}  # fmt: skip


def recipe_of(options: Options) -> "Recipe":
    """The papers' settings, changed by a recipe file."""
    from dataclasses import replace

    import yaml

    from lab.models import source
    from siftune.recipe.read import load_recipe

    if options.recipe:
        load_recipe(options.recipe)  # its own errors first
        for name in yaml.safe_load(Path(options.recipe).read_text(encoding="utf-8")) or {}:
            if name in _SET_ELSEWHERE:
                raise RecipeError(f"{options.recipe}: {name} is set {_SET_ELSEWHERE[name]}: leave it out of the file")
    recipe = load_recipe(_RECIPE, *([options.recipe] if options.recipe else []))
    return replace(recipe, model=source(options.model))


def _reproduction(options: Options) -> "Reproduction":
    from lab.reproduce.answers import METRICS, Asking
    from lab.reproduce.questions import TASKS
    from lab.reproduce.runs import Reproduction
    from siftune.train.rates.grid import grid_of

    recipe, named = recipe_of(options), options.answers == "names"
    tasks = _listed("tasks", options.tasks, tuple(TASKS))
    # a generated answer is read by the option's name
    metrics = _listed("metrics", options.metrics, tuple(one for one in METRICS if named or one != "generated"))
    return Reproduction(
        recipe,
        tuple(task for task in TASKS if task in tasks),
        grid_of(recipe, options.methods, options.rates, options.seeds),
        _groups(options),
        Path(options.out or f"runs/{Path(options.model).name}").expanduser(),
        Asking(metrics, recipe.template, options.batch_size, ends=named),
        options.sweep_steps,
    )


def _groups(options: Options) -> "tuple[Group, ...]":
    """Every adapter type with prompts learned or masked."""
    from lab.reproduce.runs import Group
    from siftune.models.adapters.registry import ADAPTER_TYPES

    adapters = _listed("adapters", options.adapters, (*ADAPTER_TYPES, "full"))
    prompts = _listed("prompts", options.prompts, ("learned", "masked"))
    return tuple(Group(adapter, one) for adapter in adapters for one in prompts)


def _listed(name: str, text: str | None, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Names of a list with commas, each once; all choices if it is None."""
    names = choices if text is None else tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    others = [each for each in names if each not in choices]
    if others or not names:
        raise RecipeError(f"--{name} names {others[0] if others else 'none'}; there are {', '.join(choices)}")
    return names


def _about(options: Options, work: "Reproduction", data: Path) -> dict[str, Any]:
    """What decides the results, for `begin`."""
    from lab.reproduce.questions import trained_on
    from siftune.recipe.read import recipe_values

    free = ("lr", "seed", "adapter", "completion_only")  # may differ between calls of one folder
    about = {key: value for key, value in recipe_values(work.recipe).items() if key not in free}
    about |= {"data": str(data), "limit": options.limit, "questions": options.questions, "answers": options.answers}
    if data.is_dir():  # not needed if its rows were copied
        about["rows of"] = trained_on(work.tasks, data)
    return about


def _report(model: str, work: "Reproduction", console: "Console | None") -> None:
    """Write table.md and results.json of the answers so far; print the tables if there is a console."""
    from lab.reproduce.questions import TASKS
    from lab.reproduce.table import results, tables
    from siftune.base.files import write_beside
    from siftune.base.text import jsonable
    from siftune.report.table import markdown_table, print_table

    rates = work.rates()
    figures = results(work.lines(), work.tasks, work.asking.metrics)
    printed = tables(f"commonsense-{model}", figures, {task: TASKS[task] for task in work.tasks}, work.reference)
    note = "learning rates: " + "; ".join(f"{label} {rate:g}" for label, rate in rates.items())
    page = "\n\n".join(f"## {table.title}\n\n{markdown_table(table)}" for table in printed)
    record = {**figures, "rates": rates, "tables": jsonable(printed), "notes": [note]}
    for name, text in (("table.md", f"{page}\n\n{note}"), ("results.json", json.dumps(record, indent=2))):
        with write_beside(work.out / name) as [beside]:
            beside.write_text(text + "\n", encoding="utf-8")
    if console is not None:
        for table in printed:
            print_table(table, console)
        console.print(note, markup=False)


if __name__ == "__main__":
    sys.exit(main())
