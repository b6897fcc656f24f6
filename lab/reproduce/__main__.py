"""`python -m lab.reproduce`: a paper's evaluation, from its rows to its table."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic.dataclasses import dataclass

from siftune.base.environment import settle_threads
from siftune.base.errors import RecipeError, SiftuneError
from siftune.base.settings import CONFIG, BelowOne, Count, Validated
from siftune.cli.options import Flag, parse

if TYPE_CHECKING:
    from rich.console import Console

    from lab.reproduce.cells import Group, Reproduction
    from lab.reproduce.offsite import Offsite
    from lab.reproduce.protocol import Protocol

_KEEP = 0.7  # ours, as `siftune emulate` has it


@dataclass(config=CONFIG)
class Options(Validated):
    """Reproduce a paper's table: rates, runs, answers, and the paper's figures beside one's own.

    NAME is a suite and a model: commonsense, math or gradot, with llama-7b, llama-13b, llama3-8b, gpt-j-6b, opt-1.3b,
    opt-6.7b, smollm2 or gemma3-270m, such as commonsense-llama-7b. Learning rates are found on held-out rows first,
    for each method. A run that was cut off resumes if the command is called again with the same --out, where
    methods, adapters and seeds can be added.
    """

    name: Annotated[str, Flag(positional=True)]
    """Which table: see above."""
    methods: str | None = None
    """Methods, with commas between, such as dense,ist,gast; dense if not given. For gradot the emulators: gradot (as
    the paper has it), whitened (as siftune emulate has it), layerdrop; gradot if not given."""
    adapters: str | None = None
    """Adapter types, separated by commas, such as lora,dora,series,parallel; the recipe's if not given."""
    prompts: str | None = None
    """learned, as the papers' code has it, masked (the answers alone are learned), or both with a comma between; as the
    recipe has it if not given."""
    answers: Literal["names", "texts"] | None = None
    """commonsense: names (Answer1), as the papers have it, or texts, for small models: options are not listed, and what
    the right one says is the answer (lab/README.md); names if not given."""
    seeds: str = "0"
    """Seeds, with commas between."""
    data: str = "hub"
    """Folder with the rows (lab/README.md); or hub, where there is a network."""
    out: str | None = None
    """Folder for everything; runs/NAME if not given."""
    tasks: str | None = None
    """Tasks to ask, with commas between; all of the suite if not given."""
    metrics: str | None = None
    """What is asked, with commas between: generated (the answer in what the model writes), likeliest (by
    log-likelihood), nats (of the right answer); all that the suite has if not given."""
    rates: str | None = None
    """Learning rates to try, with commas between; one is taken without a sweep; the suite's if not given."""
    sweep_steps: Count | None = None
    """Steps of each run of the sweep; as many as a run has if not given, since the best rate depends on them."""
    keep: BelowOne | None = None
    """gradot: fraction of the middle's parameters that a kit holds; 0.7 if not given."""
    model: str | None = None
    """Another model in the place of the paper's: a folder, hub id or smollm2."""
    recipe: str | None = None
    """Recipe file (.yaml) whose lines stand in the place of the paper's, such as steps or checkpointing."""
    limit: Count | None = None
    """Train on N of the rows, drawn evenly; for gradot, of each task."""
    questions: Count | None = None
    """Ask only the first N questions of each task."""
    batch_size: Count = 16
    """Rows in a forward pass when questions are asked; training takes the recipe's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 if the user's input is at fault."""
    settle_threads()
    try:
        run(parse(Options, sys.argv[1:] if argv is None else argv, "python -m lab.reproduce"))
    except SiftuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: Options) -> dict[str, Any]:
    """Do what is missing, and print the tables."""
    from lab.reproduce.protocol import protocol_of

    protocol = protocol_of(options.name, *([options.recipe] if options.recipe else []))
    _refuse_lines(options.recipe)
    _refuse_idle(options, protocol)
    options = replace(options, limit=options.limit or protocol.recipe.limit)
    changed = replace(protocol.recipe, model=options.model or protocol.recipe.model, limit=None)
    work = _opened(options, replace(protocol, recipe=changed))
    return _work(options, work)


# what a protocol sets for each run -> where it is given
_GIVEN = {
    "method": "by --methods", "lr": "by --rates", "seed": "by --seeds", "out": "by --out", "train": "by --data",
    "eval": "by the protocol", "quantize": "nowhere: questions are asked of a base that is not quantised",
}  # fmt: skip


def _refuse_lines(recipe: str | None) -> None:
    """Refuse lines of a recipe file without effect."""
    from siftune.recipe.read import load_recipe
    from siftune.recipe.schema import Recipe

    own: Recipe = load_recipe(*([recipe] if recipe else []))
    for name, where in _GIVEN.items():
        if getattr(own, name) != getattr(Recipe(), name):
            raise RecipeError(f"{recipe}: {name} is set {where}: leave it out of the file")


def _refuse_idle(options: Options, protocol: "Protocol") -> None:
    """Refuse options without effect on a suite."""
    idle = ["adapters", "prompts"] if protocol.suite.emulators else ["keep"]
    if protocol.suite.emulators or "likeliest" not in protocol.suite.metrics:  # no options to list
        idle.append("answers")
    for name in idle:
        if getattr(options, name) is not None:
            raise RecipeError(f"--{name} has no effect on {options.name}: leave it out")


def _listed(name: str, text: str | None, known: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    """What a list with commas between names, each once."""
    named = default if text is None else tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    unknown = [word for word in named if word not in known]
    if unknown or not named:
        raise RecipeError(f"--{name} names {unknown[0] if unknown else 'none'}; there are {', '.join(known)}")
    return named


def _opened(options: Options, protocol: "Protocol") -> "Reproduction | Offsite":
    """The work that the options ask for."""
    from lab.reproduce.answers import Asking
    from lab.reproduce.cells import Reproduction
    from lab.reproduce.offsite import METHOD, Offsite
    from siftune.train.rates.grid import grid_of

    suite = protocol.suite
    listed = _listed("tasks", options.tasks, suite.tasks, suite.tasks)
    tasks = tuple(task for task in suite.tasks if task in listed)
    named = options.answers != "texts"
    known = tuple(one for one in suite.metrics if named or one != "generated")  # which reads an option's name
    metrics = _listed("metrics", options.metrics, known, known)
    ends = named and not suite.emulators
    asking = Asking(metrics, protocol.recipe.template, suite.max_new_tokens, options.batch_size, ends)
    rates = options.rates or ",".join(map(str, suite.rates))
    out = Path(options.out or f"runs/{options.name}").expanduser()
    methods = options.methods or ",".join(suite.methods)
    if suite.emulators:
        emulators = _listed("methods", methods, tuple(suite.emulators), suite.methods)
        grid = grid_of(protocol.recipe, METHOD, rates, options.seeds)
        keep = _KEEP if options.keep is None else options.keep
        return Offsite(protocol, tasks, grid, emulators, keep, out, asking, options.sweep_steps)
    grid = grid_of(protocol.recipe, methods, rates, options.seeds)
    groups = _groups(options, protocol)
    return Reproduction(protocol, tasks, grid, groups, out, asking, options.sweep_steps, options.answers or "names")


def _groups(options: Options, protocol: "Protocol") -> "tuple[Group, ...]":
    """Every adapter type with prompts learned or masked."""
    from lab.reproduce.cells import Group
    from siftune.models.adapters.registry import ADAPTER_TYPES

    recipe = protocol.recipe
    adapters = _listed("adapters", options.adapters, (*ADAPTER_TYPES, "full"), (recipe.adapter,))
    own = "masked" if recipe.completion_only else "learned"
    prompts = _listed("prompts", options.prompts, ("learned", "masked"), (own,))
    return tuple(Group(adapter, words) for adapter in adapters for words in prompts)


# what may differ between calls of one folder
_FREE = ("lr", "seed", "adapter", "completion_only")


def _about(options: Options, work: "Reproduction | Offsite") -> dict[str, Any]:
    """What decides the results, for `begin`."""
    from lab.reproduce.offsite import Offsite
    from lab.reproduce.rows import HUB, trained_on
    from siftune.recipe.read import recipe_values

    suite = work.protocol.suite
    about = {key: value for key, value in recipe_values(work.protocol.recipe).items() if key not in _FREE}
    data = _data(options)
    about |= {"name": options.name, "data": data, "limit": options.limit, "questions": options.questions}
    if isinstance(work, Offsite):
        about["rows of"] = work.tasks
        return about
    about["answers"] = work.answers
    if data == HUB or Path(data).is_dir():  # a folder that is gone is needed no more where its rows are here
        about["rows of"] = trained_on(suite, work.tasks, data)
    return about


def _data(options: Options) -> str:
    from lab.reproduce.rows import HUB

    return options.data if options.data == HUB else str(Path(options.data).expanduser().absolute())


def _work(options: Options, work: "Reproduction | Offsite") -> dict[str, Any]:
    from contextlib import nullcontext

    from rich.console import Console

    from siftune.base.stages import stages

    console, started = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True), time.monotonic()
    work.begin(_about(options, work))
    work.prepare(_data(options), options.limit, options.questions)
    try:
        with stages(console) if console.is_terminal else nullcontext(lambda *_: None) as progress:
            for name in work.work(console, progress):
                console.print(f"{name} is done", markup=False)
    except BaseException:
        _report(work, None)  # of what is there
        raise
    found = _report(work, Console(highlight=False, emoji=False, soft_wrap=True))
    console.print(f"done in {time.monotonic() - started:.0f} s: tables and runs in {work.out}", markup=False)
    return {"folder": work.out, **found}


def _report(work: "Reproduction | Offsite", console: "Console | None") -> dict[str, Any]:
    """Write table.md and results.json of what is there, and print the tables if there is somewhere to."""
    import json

    from lab.reproduce.protocol import sources
    from lab.reproduce.table import results, tables
    from siftune.base.files import write_beside
    from siftune.base.text import jsonable
    from siftune.report.table import markdown_table, print_table

    protocol, rates = work.protocol, work.rates()
    found = results(work.lines(), work.tasks, work.asking.metrics)
    titles = {name: task.title for name, task in protocol.suite.tables.items() if name in work.tasks}
    made = tables(protocol.name, found, titles, protocol.printed, work.reference)
    notes = [f"{name}: {words}" for name, words in sources().items() if any(p.source == name for p in protocol.printed)]
    notes.append("learning rates: " + "; ".join(f"{label} {rate:g}" for label, rate in rates.items()))
    page = "\n\n".join(f"## {table.title}\n\n{markdown_table(table)}" for table in made)
    record = {**found, "rates": rates}
    for name, text in (
        ("table.md", page + "\n\n" + "\n".join(notes)),
        ("results.json", json.dumps(record | {"tables": jsonable(made), "notes": notes}, indent=2)),
    ):
        with write_beside(work.out / name) as [beside]:
            beside.write_text(text + "\n", encoding="utf-8")
    if console is not None:
        for table in made:
            print_table(table, console)
        console.print("\n".join(notes), markup=False)
    return {"results": found, "rates": rates}


if __name__ == "__main__":
    sys.exit(main())
