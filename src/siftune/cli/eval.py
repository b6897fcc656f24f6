"""`siftune eval`: measure runs, adapters and models on held-out rows, base against tuned."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic.dataclasses import dataclass

from siftune.base.errors import RecipeError
from siftune.base.settings import CONFIG, Chance, Count, Seed, Validated
from siftune.base.text import jsonable
from siftune.cli.options import Flag
from siftune.recipe.schema import Recipe, train_files

if TYPE_CHECKING:
    from siftune.cli.subjects import Subject
    from siftune.data.rows import Row
    from siftune.evaluate.measure import Metrics


@dataclass(config=CONFIG)
class Options(Validated):
    """Measure base models and tuned ones on held-out rows: multiple choice, exact match and perplexity."""

    runs: Annotated[tuple[str, ...], Flag("run", positional=True)]
    """What to measure: run folders, PEFT adapter folders, kits, or models (folder, hub id, smollm2)."""
    data: str | None = None
    """Held-out rows: a .jsonl, .json, .csv or .parquet file, or a hub id; a run's own if not given, its
    eval_share among them."""
    split: str = "test"
    """Split of --data, where it has splits."""
    limit: Count | None = None
    """Use at most N rows."""
    metrics: tuple[Literal["auto", "choices", "exact_match", "perplexity"], ...] = ("auto",)
    """What to measure; auto goes by the columns: choices, or exact match for short answers, and perplexity."""
    format: Literal["auto", "prompt", "messages", "alpaca", "text"] | None = None
    """Columns of the rows; as in a run's recipe, or auto, if not given."""
    template: Literal["auto", "chat", "none"] | None = None
    """Chat template: as in a run's recipe, or auto, if not given."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Number format of the weights: as in a run's recipe, or auto, if not given."""
    base: str | None = None
    """What was trained on, where it is not where the runs say: a folder, hub id, smollm2 or a kit."""
    batch_size: Count = 16
    """Rows in a forward pass."""
    max_new_tokens: Count | None = None
    """exact_match: longest text to generate; a little over the longest right one if not given."""
    level: Chance = 0.95
    """Coverage of the intervals."""
    seed: Seed = 0
    """Seed of the bootstrap."""
    public_key: Path | None = None
    """Public key of a model's owner, a PEM file; what is measured must be kits signed by the owner, or runs on them."""


@dataclasses.dataclass(frozen=True)
class _Job:
    """One subject, its settings, its rows and what they are called."""

    subject: "Subject"
    dtype: str
    template: str
    format: str
    data: str
    rows: "list[Row]"

    @property
    def of_base(self) -> tuple[Any, ...]:
        """All that decides the base model's result, so that runs which share it measure it once."""
        places = tuple(row.origin for row in self.rows)
        return self.subject.base, self.dtype, self.template, self.format, places


def run(options: Options) -> dict[str, Any]:
    """Measure each run and show a table for each; return the tables and settings."""
    from siftune.cli.subjects import find_subjects

    if not options.runs:
        raise RecipeError("nothing to measure: give a run folder, an adapter folder or a model")
    if not options.metrics:
        raise RecipeError("--metrics is empty: name at least one, or leave it out")
    # everything that can be refused without loading a model comes first
    subjects = find_subjects(options.runs, options.public_key, options.base)
    jobs = [_job(subject, options) for subject in subjects]
    known: dict[tuple[Any, ...], Metrics] = {}
    return {"runs": [_evaluate(job, options, known) for job in jobs]}


def _job(subject: "Subject", options: Options) -> _Job:
    """Settle settings and read the rows: flags first, then the run's recipe, then defaults."""
    recipe = subject.recipe or Recipe()
    dtype, template, format = (
        getattr(options, name) or getattr(recipe, name) for name in ("dtype", "template", "format")
    )
    data, rows = _rows(subject, options, format)
    return _Job(subject, dtype, template, format, data, rows)


def _rows(subject: "Subject", options: Options, format: str) -> "tuple[str, list[Row]]":
    """The rows to measure on, and what they are called."""
    from siftune.data.read import load_rows
    from siftune.records.again import is_own
    from siftune.records.rows import used_rows

    recipe = subject.recipe
    if options.data is not None:
        return options.data, load_rows(options.data, options.split, options.limit, format)
    if recipe is None:
        raise RecipeError(f"{subject.name} is no run folder, so it names no held-out rows: give --data FILE")
    if (recipe.eval or recipe.eval_share) and not is_own(Path(subject.name).expanduser()):
        raise RecipeError(
            f"this user has not trained by the recipe of {subject.name} on this machine, so the files that it names "
            "are not read: give --data FILE"
        )
    if recipe.eval:
        return recipe.eval, load_rows(recipe.eval, recipe.eval_split, options.limit, format)
    if recipe.eval_share:
        files = " and ".join(train_files(recipe))
        rows = used_rows(Path(subject.name).expanduser(), recipe, "eval")
        return f"{100 * recipe.eval_share:g} % of {files}", rows[: options.limit]
    raise RecipeError(f"the recipe of {subject.name} names no held-out rows: give --data FILE")


def _evaluate(job: _Job, options: Options, known: "dict[tuple[Any, ...], Metrics]") -> dict[str, Any]:
    """Measure one subject and show its table."""
    from rich.console import Console

    from siftune.evaluate.measure import compare
    from siftune.report.evals import Eval, answers_of, metric_table, record_eval
    from siftune.report.table import print_table

    base, tuned = _measure(job, options, known)
    compared = compare(base, tuned, options.level, options.seed)
    if job.subject.recipe is not None and tuned is not None:  # a run folder, which `siftune report` reads
        found = Eval(job.data, len(job.rows), options.level, tuple(compared), answers_of(job.rows, base, tuned))
        record_eval(Path(job.subject.name).expanduser(), found)
    table = metric_table(f"{job.subject.name} on {job.data}", compared, options.level)
    print_table(table, Console(highlight=False, soft_wrap=True))
    settings = {"run": job.subject.name, "model": job.subject.base, "data": job.data}
    return {**settings, "level": options.level, "metrics": jsonable(compared)}


def _measure(job: _Job, options: Options, known: "dict[tuple[Any, ...], Metrics]") -> "tuple[Metrics, Metrics | None]":
    """Measure the base, unless it's known, and the tuned model, if something was trained."""
    from rich.console import Console

    from siftune.cli.subjects import load_base, put_on
    from siftune.evaluate.measure import measure
    from siftune.evaluate.prepare import prepare_rows

    subject = job.subject
    with Console(stderr=True).status(f"loading {subject.name}") as status:
        model, tokenizer = load_base(subject, job.dtype)
        prepared = prepare_rows(job.rows, tokenizer, options.metrics, job.template, options.max_new_tokens)
        if job.of_base not in known:
            status.update(f"measuring {subject.base}")
            known[job.of_base] = measure(model, prepared, options.batch_size)
        if subject.adapter is None:
            return known[job.of_base], None
        status.update(f"measuring {subject.name}")
        return known[job.of_base], measure(put_on(model, subject), prepared, options.batch_size)
