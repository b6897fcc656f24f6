"""`siftune demo`: the case that pays, on a real model, in minutes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from siftune.base.errors import RecipeError
from siftune.base.files import refuse_full
from siftune.base.settings import CONFIG, Count, Positive, Seed, Validated
from siftune.base.text import jsonable
from siftune.methods import METHODS
from siftune.recipe.schema import Recipe, new_folder

if TYPE_CHECKING:
    from rich.console import Console

    from siftune.data.rows import Row
    from siftune.evaluate.measure import MetricRow, Metrics
    from siftune.report.parts import Section
    from siftune.report.table import Table

_MODEL = "smollm2"
_TASK = "two-digit arithmetic, held out"
_NAMES = {
    "base": "base",
    "pool": "pool",
    "few": "few rows alone",
    "target": "pool and few rows",
    "sifted": "sifted and few rows",
}
_RIVALS = ("target", "few")  # trainings on the few rows without sifting
_NEXT = "siftune train --train pool.jsonl --target few.jsonl --sift"
_ROWS = 16  # of a step
_LEVEL = 0.95  # coverage of the intervals
_SHOWN = 4  # questions whose answers are shown


@dataclass(config=CONFIG)
class Options(Validated):
    """Tune SmolLM2-135M on a mixed pool, on a few correct rows, on both, and on the sifted pool and the few rows.

    Of the pool a quarter is two-digit arithmetic, a quarter two-digit arithmetic with wrong answers put in, and half
    other tasks. All models are measured on held-out arithmetic. Fetches the model on first use. Leaves four run folders
    behind: `pool` and `few` as `siftune train --train FILE` makes them, `target` with `--train pool.jsonl --target
    few.jsonl`, and `sifted` also with `--sift`.
    """

    steps: Count = 60
    """Optimizer steps of 16 rows, for each of the four."""
    lr: Positive = METHODS["dense"].lr
    """Peak learning rate."""
    target_rows: Annotated[int, Field(ge=8)] = 100
    """Correct rows of the task."""
    rows: Count = 200
    """Held-out questions; none of their problems is in the training rows."""
    seed: Seed = 0
    """Seed of the task's rows and the adapter."""
    out: str | None = None
    """Folder of rows and runs; runs/DATE-demo if not given."""


def run(options: Options) -> dict[str, Any]:
    """Tune four times, and compare the training on the sifted pool with the better one without."""
    _check(options)
    import time

    from siftune.base.stages import text_console
    from siftune.data.read import load_rows
    from siftune.evaluate.measure import compare
    from siftune.report.evals import metric_table
    from siftune.report.page import make_page
    from siftune.report.table import print_table

    console, started = text_console(stderr=True), time.monotonic()
    folder = _write_rows(options)
    console.print(_about(options), markup=False)
    questions = load_rows(str(folder / "test.jsonl"))
    measured, summaries = _measure(_recipes(options, folder), console)
    rival = max(_RIVALS, key=lambda name: measured[name]["exact_match"].value)
    pairs = [*(("base", name) for name in summaries), *((name, "sifted") for name in _RIVALS)]
    comparisons = {pair: compare(measured[pair[0]], measured[pair[1]], _LEVEL) for pair in pairs}
    change = comparisons[rival, "sifted"]
    models = _models(measured, {name: run["seconds_with_sifting"] for name, run in summaries.items()})
    title = f"{_TASK}: {_NAMES['sifted']} against {_NAMES[rival]}"
    difference = metric_table(title, change, _LEVEL, (_NAMES[rival], _NAMES["sifted"]))
    sentence = _sentence(rival, change)
    _show_answers(console, questions, measured)
    for table in (models, difference):
        print_table(table, console)
    page = make_page([str(folder)], [_section(options, sentence, models, difference)]).write(folder / "report.html")
    seconds = time.monotonic() - started
    result = {
        "folder": str(folder),
        "metrics": {f"{a}-{b}": jsonable(rows) for (a, b), rows in comparisons.items()},
        "rival": rival,
        "runs": summaries,
        "seconds": round(seconds, 1),
        "report": str(page),
    }
    (folder / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"{seconds:.0f} s in all; everything is in {folder}\nreport, for a browser: {page}", markup=False)
    console.print(f"{sentence}\nnext, with rows of your own: `{_NEXT}`", markup=False)
    return result


def _about(options: Options) -> str:
    """A sentence on the pool and the few rows."""
    return (
        f"Pool: {options.steps * _ROWS:,} rows, a quarter two-digit arithmetic, a quarter two-digit arithmetic with "
        f"wrong answers put in, half other tasks. Few rows: {options.target_rows:,} correct ones of this arithmetic."
    )


def _check(options: Options) -> None:
    """Refuse more rows than there are problems, and a folder in use, before torch is imported."""
    from siftune.cli.demo_rows import PROBLEMS

    if options.out is not None:
        refuse_full(options.out)
    needed = options.steps * _ROWS // 2 + options.rows + options.target_rows
    if needed > PROBLEMS - 4:  # the four kinds are asked for equally often
        raise RecipeError(
            f"--steps {options.steps} takes {needed} problems of arithmetic with --rows and --target-rows, but there "
            f"are only {PROBLEMS - 4}; lower one of them"
        )


def _write_rows(options: Options) -> Path:
    """Draw the pool, the correct rows and the questions, and write them into the folder."""
    from siftune.base.files import writable_folder
    from siftune.cli.demo_rows import mixed_pool

    folder = Path(options.out or new_folder("demo"))
    parts = mixed_pool(options.steps * _ROWS, options.target_rows, options.rows, options.seed)
    try:
        writable_folder(folder)
    except OSError as error:
        raise RecipeError(f"{folder} cannot be written to ({error.strerror}); give another with --out") from error
    for name, rows in zip(("pool", "few", "test"), parts, strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def _recipes(options: Options, folder: Path) -> dict[str, Recipe]:
    """One for the pool, one for the correct rows, one for both, and the same to sift the pool first."""
    both: dict[str, Any] = {
        "model": _MODEL,
        "train": str(folder / "pool.jsonl"),
        "eval": str(folder / "test.jsonl"),
        "template": "none",
        "attention": "eager",  # for short rows on processors
        "lr": options.lr,
        "steps": options.steps,
        "seed": options.seed,
    }
    few = str(folder / "few.jsonl")
    return {
        "pool": Recipe(**both, out=str(folder / "pool")),
        "few": Recipe(**{**both, "train": few}, out=str(folder / "few")),
        "target": Recipe(**both, target=few, out=str(folder / "target")),
        "sifted": Recipe(**both, target=few, out=str(folder / "sifted")),
    }


def _measure(recipes: dict[str, Recipe], console: "Console") -> "tuple[dict[str, Metrics], dict[str, Any]]":
    """Train by each recipe, and measure the base and the tuned models as siftune eval does; the summaries as well."""
    import time

    from siftune.cli import eval as evaluation
    from siftune.cli.sift import text_of
    from siftune.cli.subjects import find_subject
    from siftune.sifting.sift import sift_first
    from siftune.train.run import train

    measured: dict[str, Metrics] = {}
    summaries: dict[str, Any] = {}
    bases: dict[tuple[Any, ...], Metrics] = {}
    for number, (name, recipe) in enumerate(recipes.items(), 1):
        console.print(f"model {number} of {len(recipes)}, trained on: {_NAMES[name]}", markup=False)
        started = time.monotonic()
        read = None
        if name == "sifted":
            recipe, sifted, read = sift_first(recipe, None, console)
            console.print(text_of(sifted), markup=False)
        tuned = train(recipe, console, read=read)
        summaries[name] = {**tuned.summary, "seconds_with_sifting": round(time.monotonic() - started, 1)}
        run = str(recipe.out)
        del tuned  # siftune eval loads the model again
        options = evaluation.Options(runs=(run,), metrics=("exact_match", "choices"), level=_LEVEL)
        job = evaluation.job_of(find_subject(run), options)
        base, own = evaluation.measure_job(job, options, bases)
        assert own is not None  # there is an adapter
        evaluation.record_job(job, base, own, options, shown=False)
        measured |= {"base": base, name: own}
    return measured, summaries


def _show_answers(console: "Console", questions: "list[Row]", measured: "dict[str, Metrics]") -> None:
    """Show a few answers."""
    from siftune.report.words import cut

    texts = [measured[name]["exact_match"].texts for name in _NAMES]
    for row, *answers in list(zip(questions, *texts, strict=True))[:_SHOWN]:
        shown = "  ".join(
            f"{name}: {cut(' '.join(text.split()), 12)!r}" for name, text in zip(_NAMES.values(), answers, strict=True)
        )
        console.print(f"  {row.prompt[-1].content.splitlines()[0]}  {shown}", markup=False)


def _models(measured: "dict[str, Metrics]", seconds: dict[str, float]) -> "Table":
    """A table of the models, with the time that each took."""
    from siftune.report.evals import label_of
    from siftune.report.table import Table

    metrics = ("choices", "exact_match")
    rows = [
        (label, *(f"{100 * measured[name][metric].value:.1f} %" for metric in metrics), f"{seconds.get(name, 0):.0f} s")
        for name, label in _NAMES.items()
    ]
    title = f"{_TASK}; the pool has wrong answers put in"
    return Table(("trained on", *map(label_of, metrics), "time"), rows, title, words=(0,))


def _sentence(rival: str, change: "list[MetricRow]") -> str:
    """A sentence on the paired difference in exact match."""
    from siftune.report.evals import change_text

    row = next(row for row in change if row.metric == "exact_match")
    points, low, high = (change_text(row.metric, value) for value in (row.difference, row.low, row.high))
    others = " and ".join(f"“{_NAMES[name]}”" for name in _RIVALS)
    return (
        f"Exact match of “{_NAMES['sifted']}” against “{_NAMES[rival]}”, the better of {others}: {points} points, "
        f"{100 * _LEVEL:g} % interval {low} to {high}, paired by question"
    )


def _section(options: Options, sentence: str, models: "Table", difference: "Table") -> "Section":
    """The result, for the page."""
    from siftune.report.parts import Section, grid_of

    words = [_about(options), f"{sentence}.", f"Next, with rows of your own: `{_NEXT}`"]
    return Section("demo", "Result of the demo", words, tables=[*map(grid_of, (models, difference))])
