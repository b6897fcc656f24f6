"""`siftune demo`: the case that pays, on a real model, in minutes."""

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from siftune.base.errors import RecipeError
from siftune.base.settings import CONFIG, Count, Positive, Seed, Validated
from siftune.base.text import jsonable
from siftune.methods import METHODS
from siftune.recipe.schema import Recipe, new_folder

if TYPE_CHECKING:
    from rich.console import Console

    from siftune.data.rows import Row
    from siftune.evaluate.measure import Metrics

_MODEL = "smollm2"
_TASK = "two-digit arithmetic, held out"
_NAMES = {"base": "base", "pool": "pool", "target": "pool and few", "sifted": "sifted and few"}
_ROWS = 16  # of a step
_BATCH = 64  # rows per forward pass when measuring
_LEVEL = 0.95  # coverage of the intervals
_SHOWN = 4  # questions whose answers are shown


@dataclass(config=CONFIG)
class Options(Validated):
    """Tune SmolLM2-135M on a mixed pool, on the pool with a few correct rows, and on the sifted pool with them.

    Of the pool a quarter is two-digit arithmetic, a quarter arithmetic with wrong answers, and half other tasks. All
    are measured on held-out arithmetic. Fetches the model on first use. Leaves three run folders behind, as
    `siftune train --train pool.jsonl` makes them, then with `--target few.jsonl`, then also with `--sift`.
    """

    steps: Count = 60
    """Optimizer steps of 16 rows, for each of the three."""
    lr: Positive = METHODS["dense"].lr
    """Peak learning rate."""
    known: Annotated[int, Field(ge=8)] = 100
    """Correct rows of the task."""
    rows: Count = 200
    """Held-out questions; none of their problems is in the training rows."""
    seed: Seed = 0
    """Seed of the task's rows and the adapter."""
    out: str | None = None
    """Folder of rows and runs; runs/DATE-demo if not given."""


def run(options: Options) -> dict[str, Any]:
    """Tune three times, and compare each model with the one before."""
    import time

    from siftune.base.stages import text_console
    from siftune.data.read import load_rows
    from siftune.evaluate.measure import compare
    from siftune.report.evals import metric_table
    from siftune.report.page import make_page
    from siftune.report.table import print_table

    _check(options)
    console, started = text_console(stderr=True), time.monotonic()
    folder = _write_rows(options)
    questions = load_rows(str(folder / "test.jsonl"))
    measured, summaries = _measure(_recipes(options, folder), questions, console)
    compared = [compare(measured[first], measured[second]) for first, second in pairwise(_NAMES)]
    _show(console, questions, measured, {name: run["seconds_with_sifting"] for name, run in summaries.items()})
    print_table(metric_table(_TASK, compared[-1], names=(_NAMES["target"], _NAMES["sifted"])), console)
    page = make_page([str(folder)]).write(folder / "report.html")
    seconds = time.monotonic() - started
    console.print(f"{seconds:.0f} s in all; everything is in {folder}", markup=False)
    result = {
        "folder": str(folder),
        "metrics": {f"{a}-{b}": jsonable(rows) for (a, b), rows in zip(pairwise(_NAMES), compared, strict=True)},
        "runs": summaries,
        "seconds": round(seconds, 1),
        "report": str(page),
    }
    (folder / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"report, for a browser: {page}", markup=False)
    return result


def _check(options: Options) -> None:
    """Refuse more rows than there are problems, before a folder is made."""
    from siftune.data.tasks import PROBLEMS

    needed = options.steps * _ROWS // 2 + options.rows + options.known
    if needed > PROBLEMS - 4:  # the four kinds are asked for equally often
        raise RecipeError(
            f"--steps {options.steps} takes {needed} problems of arithmetic with --rows and --known, but there are "
            f"only {PROBLEMS}; lower --steps"
        )


def _write_rows(options: Options) -> Path:
    """Draw the pool, the known rows and the questions, and write them into the folder."""
    from siftune.base.files import writable_folder
    from siftune.data.tasks import mixed_pool

    folder = Path(options.out or new_folder("demo"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RecipeError(f"{folder} is there already; give another folder with --out.")
    parts = mixed_pool(options.steps * _ROWS, options.known, options.rows, options.seed)
    try:
        writable_folder(folder)
    except OSError as error:
        raise RecipeError(f"{folder} cannot be written to ({error.strerror}); give another with --out.") from error
    for name, rows in zip(("pool", "few", "test"), parts, strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def _recipes(options: Options, folder: Path) -> dict[str, Recipe]:
    """One for the pool alone, one for the pool and the known rows, and the same to sift the pool first."""
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
        "target": Recipe(**both, target=few, out=str(folder / "target")),
        "sifted": Recipe(**both, target=few, out=str(folder / "sifted")),
    }


def _measure(
    recipes: dict[str, Recipe], questions: "list[Row]", console: "Console"
) -> "tuple[dict[str, Metrics], dict[str, Any]]":
    """Train by each recipe, and measure what comes out, and the base model; the runs' summaries as well."""
    import time

    from siftune.cli.sift import text_of
    from siftune.evaluate.measure import measure, measure_base
    from siftune.evaluate.prepare import prepare_rows
    from siftune.sifting.run import sift_first
    from siftune.suspects.losses import score_run
    from siftune.train.run import train

    measured: dict[str, Metrics] = {}
    summaries = {}
    for name, recipe in recipes.items():
        started = time.monotonic()
        if name == "sifted":
            recipe, sifted = sift_first(recipe, None, console)
            console.print(text_of(sifted), markup=False)
        tuned = train(recipe, console)
        summaries[name] = {**tuned.summary, "seconds_with_sifting": round(time.monotonic() - started, 1)}
        if name == "pool":  # the page shows rows that may be wrong
            score_run(Path(str(recipe.out)), tuned.model, tuned.tokenizer)
        prepared = prepare_rows(questions, tuned.tokenizer, ("exact_match", "choices"), recipe.template)
        console.print(f"measuring on {len(questions)} held-out questions")
        if not measured:
            measured["base"] = measure_base(tuned.model, prepared, _BATCH)
        measured[name] = measure(tuned.model, prepared, _BATCH)
        _keep(recipe, questions, measured["base"], measured[name])
    return measured, summaries


def _keep(recipe: Recipe, questions: "list[Row]", base: "Metrics", tuned: "Metrics") -> None:
    """Keep figures and answers in the run's folder, as siftune eval does."""
    from siftune.evaluate.measure import compare
    from siftune.report.evals import Eval, answers_of, record_eval

    answers = answers_of(questions, base, tuned)
    found = Eval(str(recipe.eval), len(questions), _LEVEL, tuple(compare(base, tuned, _LEVEL)), answers)
    record_eval(Path(str(recipe.out)), found)


def _show(
    console: "Console", questions: "list[Row]", measured: "dict[str, Metrics]", seconds: dict[str, float]
) -> None:
    """Show a few answers, and a table of the models with the time that each took."""
    from siftune.report.evals import label_of
    from siftune.report.table import Table, print_table
    from siftune.report.words import cut

    texts = [measured[name]["exact_match"].texts for name in _NAMES]
    for row, *answers in list(zip(questions, *texts, strict=True))[:_SHOWN]:
        shown = "  ".join(
            f"{name}: {cut(' '.join(text.split()), 24)!r}" for name, text in zip(_NAMES.values(), answers, strict=True)
        )
        console.print(f"  {row.prompt[-1].content.splitlines()[0]}  {shown}", markup=False)
    metrics = ("choices", "exact_match")
    rows = [
        (label, *(f"{100 * measured[name][metric].value:.1f} %" for metric in metrics), f"{seconds.get(name, 0):.0f} s")
        for name, label in _NAMES.items()
    ]
    print_table(Table(("trained on", *map(label_of, metrics), "time"), rows, _TASK, words=(0,)), console)
