"""`siftune demo`: the main job, on a real model and a real task, in minutes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from siftune.config import Recipe
from siftune.errors import RecipeError
from siftune.jsonable import jsonable
from siftune.methods import METHODS

if TYPE_CHECKING:
    from rich.console import Console

    from siftune.evaluate.measure import MetricRow
    from siftune.trainer.run_folder import RunFolder

_MODEL = "smollm2"


@dataclass
class Options:
    """Tune SmolLM2-135M on two-digit arithmetic, and measure it before and after.

    Fetches the model on first use. Leaves a run folder behind, like `siftune train`.
    """

    method: Literal[tuple(METHODS)] = "ist"  # type: ignore[valid-type]
    """How to train, as for siftune train."""
    steps: int = 150
    """Optimizer steps of 16 rows."""
    lr: float = 2e-3
    """Peak learning rate."""
    rows: int = 200
    """Held-out questions; none of their problems is in the training rows."""
    seed: int = 0
    """Seed of the task's rows, the adapter and the method."""
    out: str | None = None
    """Run folder; runs/DATE-demo if not given."""


def run(options: Options) -> dict[str, Any]:
    """Measure, tune, measure again."""
    import time

    from rich.console import Console

    from siftune.data.readers import load_rows
    from siftune.evaluate.measure import compare, measure, measure_base
    from siftune.evaluate.prepare import prepare_rows
    from siftune.trainer.run import train

    if options.steps < 1 or options.rows < 1 or options.lr <= 0:
        raise RecipeError("--steps and --rows must be at least 1, and --lr above 0")
    console, started = Console(stderr=True, highlight=False, soft_wrap=True), time.monotonic()
    recipe = _recipe(options)
    tuned = train(recipe, console)
    questions = load_rows(str(recipe.eval))
    prepared = prepare_rows(questions, tuned.tokenizer, ("exact_match", "choices"), recipe.template)
    console.print(f"measuring on {len(questions)} held-out questions: base model, tuned model")
    base, after = measure_base(tuned.model, prepared, 64), measure(tuned.model, prepared, 64)
    compared = compare(base, after)
    seconds = time.monotonic() - started
    _show(console, compared, questions, base["exact_match"].texts, after["exact_match"].texts)
    console.print(f"{seconds:.0f} s in all; everything is in {tuned.folder.path}")
    result = {
        "run": tuned.folder.path,
        "metrics": jsonable(compared),
        **tuned.summary,
        "seconds": round(seconds, 1),
    }
    _record(tuned.folder, result)
    return result


def _recipe(options: Options) -> Recipe:
    """Write the task's rows into the run folder, and make a recipe of them."""
    from datetime import datetime

    from siftune.data.arithmetic import split
    from siftune.trainer.run_folder import RunFolder

    folder = RunFolder(options.out or f"runs/{datetime.now():%Y%m%d-%H%M%S}-demo")
    if not folder.is_fresh():
        raise RecipeError(f"{folder.path} holds a run already; give another folder with --out.")
    train_rows, test_rows = split(options.steps * 16, options.rows, options.seed)
    for name, rows in (("train.jsonl", train_rows), ("test.jsonl", test_rows)):
        folder.write(name, "".join(json.dumps(row) + "\n" for row in rows))
    return Recipe(
        model=_MODEL,
        train=str(folder.path / "train.jsonl"),
        eval=str(folder.path / "test.jsonl"),
        template="none",
        method=options.method,
        lr=options.lr,
        steps=options.steps,
        seed=options.seed,
        out=str(folder.path),
    )


def _show(
    console: "Console",
    compared: "list[MetricRow]",
    questions: list[Any],
    before: tuple[str, ...],
    after: tuple[str, ...],
) -> None:
    """Show a few answers and the table."""
    from siftune.report.metrics import metric_table
    from siftune.report.table import print_table

    for row, base, tuned in list(zip(questions, before, after, strict=True))[:4]:
        question = row.prompt[-1].content.strip()
        console.print(f"  {question}  before: {_short(base)}  after: {_short(tuned)}", markup=False)
    print_table(metric_table("two-digit arithmetic, held out", compared), console)


def _short(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= 24 else words[:23] + "…")


def _record(folder: "RunFolder", result: dict[str, Any]) -> None:
    """Leave the result in the run folder."""
    folder.write("demo.json", json.dumps({**result, "run": str(Path(result["run"]))}, indent=2) + "\n")
