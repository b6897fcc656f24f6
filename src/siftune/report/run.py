"""Sections on one run: training, base and tuned, suspect rows, recipe."""

from collections.abc import Sequence

from siftune.base.errors import InputError
from siftune.base.text import counted
from siftune.evaluate.measure import PERPLEXITY
from siftune.recipe.read import recipe_to_yaml
from siftune.records.rows import Text
from siftune.report.charts import Chart, Line, Point, Scale, line_chart, listed_points
from siftune.report.evals import Eval, label_of, metric_table
from siftune.report.parts import Cell, Figure, Grid, Section, grid_of, slug
from siftune.report.subjects import RunData
from siftune.report.words import cut, short
from siftune.suspects.named import ScoredRows
from siftune.train.folder.run import LOSSES

# key in metrics.jsonl, title, how it is drawn
_COURSES = (
    ("learning_rate", "Learning rate", Chart("of the schedule", zero=True)),
    ("seconds_per_step", "Time", Chart("seconds per step", zero=True)),
    ("peak_memory_mb", "Memory", Chart("peak so far, 10⁶ bytes", zero=True)),
    ("grad_norm", "Gradient", Chart("norm before clipping", zero=True)),
)
_PRIVATE = (
    "Losses and norms in this section are computed without noise, so that the guarantee of differential privacy does "
    "not cover them. Treat this page like the training rows."
)


def training(runs: Sequence[RunData]) -> Section | None:
    """Losses, learning rate, time and memory of all runs; None if nothing is logged."""
    if not any(run.metrics for run in runs):
        return None
    figures = _losses(runs)
    figures += [_course(runs, key, title, chart) for key, title, chart in _COURSES]
    if len(runs) == 1:
        figures.append(_course(runs, "tokens_per_second", "Speed", Chart("tokens per second", zero=True)))
    private = any(run.recipe.dp_epsilon is not None for run in runs)
    return Section("training", "Training", [_PRIVATE] if private else [], figures)


def _losses(runs: Sequence[RunData]) -> list[Figure]:
    chart = Chart("nats per token")
    if len(runs) == 1:
        train, held_out = Line("training", *runs[0].course("loss")), Line("held out", *runs[0].course("eval_loss"), 1)
        return [line_chart("loss", "Loss", [train, held_out], chart, _held_out_note([held_out]))]
    trained, measured = (_courses(runs, key) for key in ("loss", "eval_loss"))
    return [
        line_chart("loss", "Training loss", trained, chart),
        line_chart("held-out-loss", "Held-out loss", measured, chart, _held_out_note(measured)),
    ]


def _held_out_note(held_out: Sequence[Line]) -> str:
    if not any(line.xs for line in held_out):
        return "No held-out loss: train with --eval FILE to measure it."
    return ""


def _course(runs: Sequence[RunData], key: str, title: str, chart: Chart) -> Figure:
    lines = _courses(runs, key) if len(runs) > 1 else [Line("", *runs[0].course(key))]
    return line_chart(key.replace("_", "-"), title, lines, chart)


def _courses(runs: Sequence[RunData], key: str) -> list[Line]:
    return [Line(run.name, *run.course(key), colour=number) for number, run in enumerate(runs)]


_LONG = 600  # letters of a text
_NOTHING = "(nothing)"


def answers(run: RunData, several: bool) -> Section:
    """The base model against the tuned one; a hint if they are not measured yet."""
    title = f"Base and tuned{f': {run.name}' if several else ''}"
    anchor = f"answers-{slug(run.name)}"
    if not run.evals:
        return Section(
            anchor, title, [f"Not measured yet. `siftune eval {run.path} --data FILE` adds the result here."]
        )
    newest = run.evals[-1]
    words = [
        f"{newest.rows:,} rows of {newest.data}, the same for both models, with {100 * newest.level:g} % intervals."
    ]
    if not newest.answers:
        words.append("The models generated no texts for these rows, so there are no answers to compare.")
    caption = "Measured on held-out rows; differences of shares in points."
    tables = [grid_of(metric_table(caption, newest.metrics, newest.level))]
    tables += [_texts(newest)] if newest.answers else []
    return Section(anchor, title, words, _rates(run, newest), tables)


def _rates(run: RunData, found: Eval) -> list[Figure]:
    """Shares of correct answers of both models."""
    rates = [row for row in found.metrics if row.metric != PERPLEXITY and row.tuned is not None]
    scale, drawn = Scale("share of correct answers", percent=True), []
    for row in rates:
        assert row.tuned is not None
        models = (("base", row.base, row.base_interval), ("tuned", row.tuned, row.tuned_interval))
        pair = []
        for number, (name, value, bounds) in enumerate(models):
            low, high = bounds or (None, None)
            pair.append(Point(name, value, low, high, colour=number))
        name, title = f"{slug(row.metric)}-{slug(run.name)}", label_of(row.metric).capitalize()
        drawn.append(listed_points(name, title, pair, scale, size="third"))
    return drawn


def _texts(found: Eval) -> Grid:
    rows = [
        [
            Cell(str(place), place),
            Cell(cut(one.prompt, _LONG)),
            Cell(cut(one.right, _LONG)),
            Cell(_answer(one.base), mark="good" if one.base_right else "bad"),
            Cell(_answer(one.tuned), mark="good" if one.tuned_right else "bad"),
        ]
        for place, one in enumerate(found.answers, 1)
    ]
    caption = f"The first {len(rows)} held-out rows, unselected. ✓ correct, ✗ wrong."
    return Grid(["row", "question", "reference", "base", "tuned"], rows, caption, range(5), cards=True)


def _answer(text: str) -> str:
    return cut(text.strip(), _LONG) or _NOTHING


_SUSPECTS = 20


def suspects(run: RunData, several: bool) -> Section | None:
    """The rows that look most likely wrong; for a single run without scores of its rows, how to get them."""
    title = f"Suspect rows{f': {run.name}' if several else ''}"
    anchor = f"suspects-{slug(run.name)}"
    if not (run.path / LOSSES).is_file():
        hint = Section(anchor, title, [f"Not scored yet. `siftune rows {run.path}` adds them here."])
        return None if several or run.recipe.dp_epsilon is not None else hint
    try:
        scored = ScoredRows(run.path)
    except InputError as error:  # changed rows, or a damaged file: the rest of the page is fine
        return Section(anchor, title, [f"Not available: {error}"])
    if not scored.suspects:
        return Section(anchor, title, [scored.doubt])
    found = scored.highest(min(_SUSPECTS, scored.suspects))
    rows = [
        [
            Cell(one.place),
            Cell(cut(_both(one.text), _LONG)),
            Cell(one.reason),
            Cell(short(one.score), one.score),
            Cell(", ".join(map(str, one.duplicates)) or "none"),
        ]
        for one in found
    ]
    caption = f"The {len(rows)} most suspect. Some rows may be correct: read before you drop any."
    header = ["row", "text", "why", "score", "near-duplicates"]
    words = [
        f"{scored.suspects:,} of {counted(len(scored.rows), 'row')} may be wrong. `siftune rows {run.path}` lists "
        "them, and writes a file for `--drop-rows`."
    ]
    return Section(anchor, title, words, tables=[Grid(header, rows, caption, (0, 1, 2, 4), cards=True)])


def _both(text: Text) -> str:
    """Prompt → completion."""
    return " → ".join(filter(None, (text.prompt.strip(), text.completion.strip())))


def setup(runs: Sequence[RunData]) -> Section | None:
    """Versions and hardware of every run, and its recipe."""
    if not runs:
        return None
    names = list(dict.fromkeys(name for run in runs for name in run.about))
    header = ["", *(run.name for run in runs)]
    rows = [[Cell(name), *(Cell(run.about.get(name, "–")) for run in runs)] for name in names]
    recipes = Grid(
        ["run", "recipe"], [[Cell(run.name), Cell(recipe_to_yaml(run.recipe).rstrip())] for run in runs],
        "The recipes, with every setting.", (0, 1),
    )  # fmt: skip
    tables = [*([Grid(header, rows, "Versions and hardware.", range(len(header)))] if rows else []), recipes]
    return Section("setup", "Recipe, versions and hardware", tables=tables, folded=True)
