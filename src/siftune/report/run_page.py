"""Sections on runs: training, base and tuned models, suspect rows, recipes."""

import shlex
from collections.abc import Mapping, Sequence

from siftune.base.errors import InputError
from siftune.base.text import counted
from siftune.data.rows import Text
from siftune.evaluate.measure import PERPLEXITY, MetricRow
from siftune.recipe.read import recipe_to_yaml
from siftune.report.charts import COLOURS, Chart, Line, Point, Scale, line_chart, listed_points
from siftune.report.evals import Eval, change_text, label_of, value_text
from siftune.report.parts import Cell, Figure, Grid, Section
from siftune.report.subjects import RunData
from siftune.report.words import NBSP, cut, data_name, listed, short, short_places
from siftune.suspects.named import ScoredRows, Suspect
from siftune.train.folder.run_folder import LOSSES

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
        figures = [line_chart("Loss", [train, held_out], chart, _held_out_note([held_out]))]
        return figures + [_by_source(runs[0], *which) for which in _SOURCES if runs[0].sources(which[0])]
    trained, measured = (_courses(runs, key) for key in ("loss", "eval_loss"))
    return [
        line_chart("Training loss", trained, chart),
        line_chart("Held-out loss", measured, chart, _held_out_note(measured)),
    ]


# keys in metrics.jsonl, without the source; title of the figure
_SOURCES = (("loss/", "Training loss by source"), ("eval_loss/", "Held-out loss by source"))


def _by_source(run: RunData, key: str, title: str) -> Figure:
    lines = [
        Line(source, *run.course(key + source), colour=at, dashed=at >= COLOURS)
        for at, source in enumerate(run.sources(key))
    ]
    return line_chart(title, lines, Chart("nats per token"))


def _held_out_note(held_out: Sequence[Line]) -> str:
    if not any(line.xs for line in held_out):
        return "No held-out loss: train with --eval FILE to measure it."
    return ""


def _course(runs: Sequence[RunData], key: str, title: str, chart: Chart) -> Figure:
    lines = _courses(runs, key) if len(runs) > 1 else [Line("", *runs[0].course(key))]
    return line_chart(title, lines, chart)


def _courses(runs: Sequence[RunData], key: str) -> list[Line]:
    return [Line(run.name, *run.course(key), colour=number) for number, run in enumerate(runs)]


_LONG = 600  # letters of a text
_FIRST = 5  # rows of a table of texts that are shown before it is unfolded
_NOTHING = "(nothing)"


def results(runs: Sequence[RunData]) -> Section | None:
    """Base and tuned models on held-out rows, a column for each run; how to measure runs that are not measured."""
    if not runs:
        return None
    words = [
        f"Not measured yet: `siftune eval {shlex.quote(str(run.path))} --data FILE` adds the result here."
        for run in runs
        if not run.evals
    ]
    groups: dict[tuple[object, ...], list[tuple[str, Eval]]] = {}
    for run in runs:
        if run.evals:
            newest = run.evals[-1]
            questions = tuple((one.prompt, one.right) for one in newest.answers)
            column = run.name if len(runs) > 1 else "tuned"
            groups.setdefault((newest.same, run.recipe.model, questions), []).append((column, newest))
    figures, tables = [], []
    for group in groups.values():
        newest = group[0][1]
        models = "all models" if len(groups) == 1 else listed(["the base model", *(f"“{name}”" for name, _ in group)])
        rows = f"{newest.rows:,} rows of {data_name(newest.data)}, the same for {models}"
        words.append(f"{rows}, with {100 * newest.level:g}{NBSP}% intervals; differences of shares in points.")
        if not newest.answers:
            words.append("The models generated no texts for these rows, so there are no answers to compare.")
        figures += _rates(group)
        tables += [_metrics(group), *([_texts(group)] if newest.answers else [])]
    return Section("results", "Base and tuned models", words, figures, tables)


Group = Sequence[tuple[str, Eval]]  # measurements on the same rows: the column of each, and its values


def _metrics(group: Group) -> Grid:
    """A line for each metric, a column for each run."""
    rows = []
    for metric in dict.fromkeys(row.metric for _, newest in group for row in newest.metrics):
        entries = [next((row for row in newest.metrics if row.metric == metric), None) for _, newest in group]
        base = next(row.base for row in entries if row is not None)
        rows.append([Cell(label_of(metric)), Cell(value_text(metric, base)), *map(_change, entries)])
    caption = "Value, and difference from the base model with its interval."
    return Grid(["metric", "base", *(name for name, _ in group)], rows, caption, cards=True)


def _change(row: MetricRow | None) -> Cell:
    if row is None or row.tuned is None:
        return Cell("–")
    text = value_text(row.metric, row.tuned)
    if row.difference is not None and row.low is not None and row.high is not None:
        change, low, high = (change_text(row.metric, value) for value in (row.difference, row.low, row.high))
        text += f"\n{change} ({low} to {high})"
    return Cell(text)


def _rates(group: Group) -> list[Figure]:
    """Shares of correct answers of the base model and of all runs."""
    drawn = []
    for metric in dict.fromkeys(row.metric for _, newest in group for row in newest.metrics):
        pairs = [
            (name, row)
            for name, newest in group
            for row in newest.metrics
            if row.metric == metric != PERPLEXITY and row.tuned is not None
        ]
        points: list[Point] = []
        for number, (name, row) in enumerate(pairs):
            assert row.tuned is not None
            if not points:
                low, high = row.base_interval or (None, None)
                points.append(Point("base", row.base, low, high, colour=COLOURS - 1))
            low, high = row.tuned_interval or (None, None)
            points.append(Point(name, row.tuned, low, high, colour=number))
        if points:
            scale = Scale("share of correct answers", percent=True)
            drawn.append(listed_points(label_of(metric).capitalize(), points, scale))
    return drawn


def _texts(group: Group) -> Grid:
    """Questions and answers, a column for each run."""
    first = group[0][1].answers
    rows = []
    for place, one in enumerate(first):
        cells = [Cell(str(place + 1)), Cell(cut(one.prompt, _LONG)), Cell(cut(one.right, _LONG))]
        cells.append(Cell(_answer(one.base), mark="good" if one.base_right else "bad"))
        for _, newest in group:
            tuned = newest.answers[place]
            cells.append(Cell(_answer(tuned.tuned), mark="good" if tuned.tuned_right else "bad"))
        rows.append(cells)
    header = ["row", "question", "reference", "base", *(name for name, _ in group)]
    caption = f"The first {len(rows)} held-out rows, unselected. ✓ correct, ✗ wrong."
    return Grid(header, rows, caption, range(len(header)), cards=True, first=_FIRST)


def _answer(text: str) -> str:
    return cut(text.strip(), _LONG) or _NOTHING


_SUSPECTS = 20


def suspects(runs: Sequence[RunData]) -> Section | None:
    """The rows that look most likely wrong, a column for each run; for a single run without scores, how to get them."""
    scored = [run for run in runs if (run.path / LOSSES).is_file()]
    if not scored:
        if len(runs) != 1 or runs[0].recipe.dp_epsilon is not None:
            return None
        command = f"`siftune rows {shlex.quote(str(runs[0].path))}`"
        return Section("suspects", "Suspect rows", [f"Not scored yet. {command} adds them here."])
    words, suspects_of = [], dict[str, list[Suspect]]()
    for run in scored:
        named = f"“{run.name}”: " if len(runs) > 1 else ""
        try:
            rows = ScoredRows(run.path)
        except InputError as error:  # changed rows, or a damaged file: the rest of the page is fine
            words.append(f"{named}Not available: {error}")
            continue
        if not rows.suspects:
            words.append(f"{named}{rows.doubt}")
            continue
        suspects_of[run.name] = rows.highest(min(_SUSPECTS, rows.suspects))
        command = f"siftune rows {shlex.quote(str(run.path))}"
        words.append(
            f"{named}{rows.suspects:,} of {counted(len(rows.rows), 'row')} may be wrong. `{command} "
            "--csv FILE` lists them in a file for `--drop-rows`, which `siftune report FILE` shows for a review."
        )
    return Section("suspects", "Suspect rows", words, tables=[_suspect_table(suspects_of)] if suspects_of else [])


def _suspect_table(suspects_of: Mapping[str, Sequence[Suspect]]) -> Grid:
    """The most suspect rows of all runs, with a column of scores for each run."""
    scores = {name: {one.place: one.score for one in rows} for name, rows in suspects_of.items()}
    every = sorted((one for rows in suspects_of.values() for one in rows), key=lambda one: -one.score)
    first = {one.place: one for one in reversed(every)}  # the highest score of a row that several runs name
    highest = sorted(first.values(), key=lambda one: -one.score)[:_SUSPECTS]
    names = short_places([one.place for one in highest])
    rows = []
    for one in highest:
        folder = one.place.removesuffix(names[one.place])  # the reason may name another row of the file
        rows.append(
            [
                Cell(names[one.place], hint=one.place),
                Cell(cut(_both(one.text), _LONG)),
                Cell(one.reason.replace(folder, "") if folder else one.reason),
                *(Cell(short(own.get(one.place))) for own in scores.values()),
            ]
        )
    columns = ["score"] if len(suspects_of) == 1 else [f"score, {name}" for name in suspects_of]
    caption = f"The {len(rows)} most suspect. Some rows may be correct: read before you drop any."
    return Grid(["row", "text", "why", *columns], rows, caption, (0, 1, 2), cards=True, first=_FIRST, unbroken=(0,))


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
