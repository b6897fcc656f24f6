"""`siftune eval`: measure runs, adapters and models on held-out rows, base against tuned."""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic.dataclasses import dataclass

from siftune.base.errors import DataError, RecipeError
from siftune.base.settings import CONFIG, Chance, Columns, Count, Seed, Template, Validated
from siftune.base.text import jsonable
from siftune.cli.options import Flag
from siftune.cli.paths import refuse_unknown
from siftune.recipe.schema import Recipe, train_files

if TYPE_CHECKING:
    from siftune.cli.subjects import Subject
    from siftune.data.rows import Row
    from siftune.evaluate.measure import Metrics


logger = logging.getLogger(__name__)


@dataclass(config=CONFIG)
class Options(Validated):
    """Measure base models and tuned ones on held-out rows: multiple choice, exact match and perplexity.

    Several runs on the same rows are compared with the first, row by row.
    """

    runs: Annotated[tuple[str, ...], Flag("run", positional=True)]
    """What to measure: run folders, PEFT adapter folders, kits, or models (folder, hub id, smollm2)."""
    data: str | None = None
    """Held-out rows: a .jsonl, .json, .csv or .parquet file, or a hub id, whose split is test if none is named, as in
    google/boolq@validation; a run's own if not given, its eval_share among them."""
    limit: Count | None = None
    """Use at most N rows."""
    metrics: tuple[Literal["auto", "choices", "exact_match", "perplexity"], ...] = ("auto",)
    """What to measure; auto goes by the columns: choices, or exact match for short answers, and perplexity."""
    columns: Columns | None = None
    """Other names of columns, such as prompt=question completion=answer; as in a run's recipe if not given."""
    template: Template | None = None
    """Chat template: as in a run's recipe, or auto, if not given."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Data type of the weights: as in a run's recipe, or auto, if not given."""
    base: str | None = None
    """Base of the runs, if it is not where they say: a folder, hub id, smollm2 or a kit."""
    batch_size: Count = 16
    """Rows in a forward pass; another number changes single answers by rounding (docs/troubleshooting.md)."""
    max_new_tokens: Count | None = None
    """exact_match: longest text to generate; a little over the longest right one if not given."""
    level: Chance = 0.95
    """Coverage of the intervals."""
    seed: Seed = 0
    """Seed of the bootstrap."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One subject, its settings, its rows and what they are called."""

    subject: "Subject"
    dtype: str
    template: str | Path
    columns: tuple[str, ...]
    data: str
    rows: "list[Row]"

    @property
    def of_rows(self) -> tuple[Any, ...]:
        """Names of columns, and places of the rows: runs with the same rows are compared."""
        return tuple(sorted(self.columns)), *(row.origin for row in self.rows)

    @property
    def of_base(self) -> tuple[Any, ...]:
        """All that decides the base model's result, so that runs which share it measure it once."""
        return self.subject.base, self.dtype, self.template, self.of_rows


def run(options: Options) -> dict[str, Any]:
    """Measure each run, show the tables, and return them with the settings."""
    if not options.runs:
        raise RecipeError("nothing to measure: give a run folder, an adapter folder or a model")
    if not options.metrics:
        raise RecipeError("--metrics is empty: name at least one, or leave it out")
    for name in options.runs:
        refuse_unknown(name)  # before torch is imported
    from siftune.cli.subjects import find_subjects

    # everything that can be refused without loading a model comes first
    subjects = find_subjects(options.runs, options.base)
    jobs = [job_of(subject, options) for subject in subjects]
    measured: dict[tuple[Any, ...], Metrics] = {}
    pairs = [measure_job(job, options, measured) for job in jobs]
    same_rows = len({job.of_rows for job in jobs}) == 1
    comparable = len(jobs) > 1 and same_rows and len({_tokens(tuned or base) for base, tuned in pairs}) == 1
    runs = [record_job(job, *pair, options, shown=not comparable) for job, pair in zip(jobs, pairs, strict=True)]
    if not comparable:
        if len(jobs) > 1:
            of_tokens = "their tokenizers or chat templates give different label tokens"
            of_rows = "their rows or columns differ; give --data FILE and --columns"
            logger.warning("the runs are not compared: %s", of_tokens if same_rows else of_rows)
        return {"runs": runs, "compared": []}
    return {"runs": runs, "compared": _compared(jobs, pairs, options)}


def job_of(subject: "Subject", options: Options) -> Job:
    """Settle settings and read the rows: flags first, then the run's recipe, then defaults."""
    from siftune.cli.subjects import template_of

    recipe = subject.recipe or Recipe()
    dtype, columns = options.dtype or recipe.dtype, options.columns or recipe.columns
    template = template_of(subject, options.template)
    data, rows = _rows(subject, options, columns)
    return Job(subject, dtype, template, columns, data, rows)


def _rows(subject: "Subject", options: Options, columns: tuple[str, ...]) -> "tuple[str, list[Row]]":
    """The rows to measure on, and what they are called."""
    from siftune.data.read import load_rows
    from siftune.recipe.training_rows import recipe_of_rows, refuse_changed, refuse_missing, used_rows

    recipe = subject.recipe
    if options.data is not None:
        return options.data, load_rows(options.data, "test", options.limit, columns)
    if recipe is None:
        raise RecipeError(f"{subject.name} is no run folder, so it names no held-out rows: give --data FILE")
    folder = Path(subject.name).expanduser()
    if recipe.eval:
        refuse_missing(folder, [recipe.eval])
        bad: list[DataError] | None = [] if recipe.bad_rows == "drop" else None
        return recipe.eval, load_rows(recipe.eval, "test", options.limit, columns, bad)
    if recipe.eval_share:
        files = " and ".join(train_files(recipe))
        parts = used_rows(folder, recipe_of_rows(folder))
        refuse_changed(folder, parts["train"])
        return f"{100 * recipe.eval_share:g} % of {files}", parts["eval"][: options.limit]
    raise RecipeError(f"the recipe of {subject.name} names no held-out rows: give --data FILE")


def record_job(job: Job, base: "Metrics", tuned: "Metrics | None", options: Options, shown: bool) -> dict[str, Any]:
    """Keep the result in the run's folder, and show its table if asked."""
    from siftune.base.stages import text_console
    from siftune.evaluate.measure import compare
    from siftune.report.evals import Eval, answers_of, digest_of_rows, metric_table, record_eval
    from siftune.report.table import print_table

    compared = compare(base, tuned, options.level, options.seed)
    if job.subject.recipe is not None and tuned is not None:  # a run folder, which `siftune report` reads
        answers, digest = answers_of(job.rows, base, tuned), digest_of_rows(job.rows)
        result = Eval(job.data, len(job.rows), options.level, tuple(compared), answers, digest)
        record_eval(Path(job.subject.name).expanduser(), result, is_part=options.limit is not None)
    if shown:
        table = metric_table(f"{job.subject.name} on {job.data}", compared, options.level)
        print_table(table, text_console())
    settings = {"run": job.subject.name, "model": job.subject.base, "data": job.data}
    return {**settings, "level": options.level, "metrics": jsonable(compared)}


def _tokens(metrics: "Metrics") -> tuple[tuple[str, bytes], ...]:
    """The metrics and the weights of their rows, which depend on the tokenizer: equal if models can be compared."""
    return tuple((name, metric.weights.tobytes()) for name, metric in metrics.items())


def _compared(
    jobs: "list[Job]", pairs: "list[tuple[Metrics, Metrics | None]]", options: Options
) -> list[dict[str, Any]]:
    """Show the values of all models, and each model against the first, paired by rows."""
    from siftune.base.stages import text_console
    from siftune.evaluate.measure import compare
    from siftune.report.evals import label_of, metric_table, value_text
    from siftune.report.table import Table, print_table

    console = text_console()
    models = {job.subject.name: tuned or base for job, (base, tuned) in zip(jobs, pairs, strict=True)}
    of_runs = [(job, base) for job, (base, tuned) in zip(jobs, pairs, strict=True) if tuned is not None]
    bases = {id(base): (job.subject.base, base) for job, base in of_runs}  # jobs with the same share one object
    names = [label_of(metric) for metric in pairs[0][0]]
    of_bases = [(f"base {name}" if len(bases) > 1 else "base", base) for name, base in bases.values()]
    lines = [*of_bases, *models.items()]
    rows = [[name, *(value_text(metric, each.value) for metric, each in values.items())] for name, values in lines]
    print_table(Table(["model", *names], rows, f"{len(jobs[0].rows):,} rows of {jobs[0].data}"), console)
    (first, before), *others = models.items()
    comparisons = []
    for name, after in others:
        metrics = compare(before, after, options.level, options.seed)
        console.print()
        title = f"{name} against {first}, paired by rows"
        print_table(metric_table(title, metrics, options.level, (first, name)), console)
        comparisons.append({"run": name, "against": first, "metrics": jsonable(metrics)})
    return comparisons


def measure_job(
    job: Job, options: Options, bases: "dict[tuple[Any, ...], Metrics]"
) -> "tuple[Metrics, Metrics | None]":
    """Measure the base, unless it's known, and the tuned model, if something was trained."""
    from siftune.base.stages import stages, text_console
    from siftune.cli.subjects import load_base, put_on, take_template
    from siftune.evaluate.measure import measure
    from siftune.evaluate.prepare import prepare_rows

    subject = job.subject
    with stages(text_console(stderr=True)) as progress:

        def measured(model: Any, name: str) -> "Metrics":
            def report(stage: str, done: int, total: int) -> None:
                progress(f"{name}: {stage}", done, total)

            return measure(model, prepared, options.batch_size, report)

        progress(f"loading {subject.name}", 0, 0)
        model, tokenizer = load_base(subject, job.dtype)
        # a run's recipe names its template
        if options.template is None and subject.recipe is None and subject.adapter is not None and subject.is_ordinary:
            take_template(subject.adapter, tokenizer)
        prepared = prepare_rows(job.rows, tokenizer, options.metrics, job.template, options.max_new_tokens)
        key = (*job.of_base, getattr(tokenizer, "chat_template", None))
        if key not in bases:
            bases[key] = measured(model, subject.base)
        if subject.adapter is None:
            return bases[key], None
        return bases[key], measured(put_on(model, subject), subject.name)
