"""The result as a sentence, and several runs side by side."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from siftune.base.text import counted
from siftune.evaluate.measure import PERPLEXITY, MetricRow
from siftune.recipe.read import recipe_values
from siftune.recipe.schema import Recipe
from siftune.report import bench, offsite, rates, sweep
from siftune.report.charts import Point, Scale, scatter
from siftune.report.evals import label_of
from siftune.report.parts import Cell, Figure, Grid, Section
from siftune.report.subjects import RunData, Subjects
from siftune.report.words import listed, memory, percent, points, short

_FIRST = ("exact_match", "choices", "choices_per_token", PERPLEXITY)  # the metric that tells most comes first


def shared_metric(runs: Sequence[RunData]) -> tuple[str, str] | None:
    """Held-out rows and metric that all runs were measured by; the newest rows, and the metric that tells most."""
    if not all(run.evals for run in runs):
        return None
    for one in reversed(runs[0].evals):
        rows = (one.data, one.rows)
        measured = [
            {row.metric for row in of.metrics} for run in runs for of in run.evals if (of.data, of.rows) == rows
        ]
        if len(measured) == len(runs):
            for metric in _FIRST:
                if all(metric in names for names in measured):
                    return one.data, metric
    return None


def measured(run: RunData, data: str, metric: str) -> MetricRow:
    """What a run has by a metric on held-out rows, where `shared_metric` found them."""
    return next(row for one in run.evals if one.data == data for row in one.metrics if row.metric == metric)


def level_text(run: RunData, data: str) -> str:
    """Coverage of the intervals of a measurement, as text."""
    return f"{100 * next(one.level for one in run.evals if one.data == data):g} %"


def held_out_alike(runs: Sequence[RunData]) -> bool:
    """Whether the runs held out the same rows, so that their losses can be compared."""
    return len({_held_out(run.recipe) for run in runs}) == 1


def _held_out(recipe: Recipe) -> tuple[object, ...]:
    """What decides the held-out rows: a file, or a share of the training rows."""
    share = ("train", "train_split", "limit", "eval_share", "drop_rows", "target")
    names = ("eval", "eval_split") if recipe.eval is not None else share
    return tuple(getattr(recipe, name) for name in names)


def value_text(metric: str, value: float) -> str:
    """A value of a metric, as text."""
    return short(value, 4) if metric == PERPLEXITY else percent(value)


def change_text(metric: str, value: float) -> str:
    """A difference of a metric, as text; of shares in points."""
    return short(value) if metric == PERPLEXITY else points(value)


_SENTENCES: dict[str, Callable[[Any], str]] = {
    "audit": offsite.audit_sentence, "kit": offsite.kit_sentence, "sweep": sweep.sentence, "rates": rates.sentence,
    "bench": bench.sentence,
}  # fmt: skip


def headline(subjects: Subjects) -> str:
    """What came out, in a sentence."""
    if len(subjects.runs) == 1:
        return _result_of_run(subjects.runs[0])
    if subjects.runs:
        return _result_of_runs(subjects.runs)
    other = subjects.others[0]
    return _SENTENCES[other.kind](other.content)


def commands(subjects: Subjects) -> list[str]:
    """What repeats it: for every run the recipe that it left, into another folder."""
    return [
        shlex.join(["siftune", "train", str(run.path / "recipe.yaml"), "--out", f"{run.path}-again"])
        for run in subjects.runs
    ]


def _result_of_run(run: RunData) -> str:
    shared = shared_metric([run])
    if run.status == "running":
        return _under_way(run)
    if shared is None:
        return _by_loss(run)
    row = measured(run, *shared)
    if row.tuned is None or row.difference is None or row.low is None or row.high is None:
        return _by_loss(run)
    base, tuned = (value_text(row.metric, value) for value in (row.base, row.tuned))
    change, low, high = (change_text(row.metric, value) for value in (row.difference, row.low, row.high))
    unit = "" if row.metric == PERPLEXITY else " points"
    return (
        f"On {counted(row.rows, 'held-out row')}, {label_of(row.metric)} went from {base} to {tuned}: {change}{unit}, "
        f"{level_text(run, shared[0])} interval {low} to {high}."
    )


def _under_way(run: RunData) -> str:
    steps, losses = run.course("loss")
    if not losses:
        return f"“{run.name}” has no logged step yet."
    total = f" of {run.recipe.steps:,}" if run.recipe.steps else ""
    held_out = run.course("eval_loss")[1]
    told = f", held-out loss {short(held_out[-1], 4)}" if held_out else ""
    return f"“{run.name}” is at step {steps[-1]:,.0f}{total}: training loss {short(losses[-1], 4)}{told}."


def _by_loss(run: RunData) -> str:
    steps = counted(int(run.figure("steps") or 0), "step")
    first, last, held_out = (run.figure(name) for name in ("loss_first", "loss_last", "eval_loss"))
    ended = "" if run.status == "finished" else f" (the run was {run.status})"
    if held_out is not None:
        return f"After {steps} the held-out loss is {short(held_out, 4)} nats per token{ended}."
    if first is None or last is None:
        return f"{steps.capitalize()} finished; no loss was logged{ended}."
    return (
        f"In {steps} the training loss went from {short(first)} to {short(last)}{ended}; nothing was held out, so that "
        "it says little about quality."
    )


def _result_of_runs(runs: Sequence[RunData]) -> str:
    shared = shared_metric(runs)
    if shared is None:
        return _by_losses(runs)
    data, metric = shared
    found = {run.name: measured(run, data, metric) for run in runs}
    valued = {name: row.tuned for name, row in found.items() if row.tuned is not None}
    if not valued:
        return _by_losses(runs)
    order = sorted(valued, key=lambda name: valued[name], reverse=metric != PERPLEXITY)
    best = found[order[0]]
    others = [f"{value_text(metric, valued[name])} for “{name}”" for name in order[1:4]]
    others.append(f"{value_text(metric, best.base)} for the base model")
    interval = ""
    if best.tuned_interval is not None:
        level = level_text(next(run for run in runs if run.name == order[0]), data)
        low, high = (value_text(metric, bound) for bound in best.tuned_interval)
        interval = f" ({level} interval {low} to {high})"
    return (
        f"“{order[0]}” is best of {len(runs)} runs: {value_text(metric, valued[order[0]])} "
        f"{label_of(metric)}{interval} on {counted(best.rows, 'held-out row')}, "
        f"against {listed(others)}."
    )


def _by_losses(runs: Sequence[RunData]) -> str:
    losses = {run.name: loss for run in runs if (loss := run.figure("eval_loss")) is not None}
    if not held_out_alike(runs) or len(losses) < 2:
        return f"{len(runs)} runs, not measured on the same held-out rows."
    order = sorted(losses, key=lambda name: losses[name])
    others = ", ".join(f"{short(losses[name], 4)} for “{name}”" for name in order[1:4])
    return (
        f"“{order[0]}” has the lowest held-out loss of {len(runs)} runs, {short(losses[order[0]], 4)} nats per token, "
        f"against {others}."
    )


_OUTSIDE = {"out", "resume", "report_to"}  # settings that change nothing of what is learned


def compare_runs(runs: Sequence[RunData]) -> Section | None:
    """Quality, time and memory of all runs; None for a single one."""
    if len(runs) < 2:
        return None
    quality, words = _quality(runs)
    figures = [
        _against(quality, runs, "seconds", "Quality and time", "seconds of training, and of sifting"),
        _against(quality, runs, "peak_memory_mb", "Quality and memory", "peak memory, 10⁶ bytes"),
    ]
    tables = [_table(runs, quality), _differences(runs)]
    return Section("compare", "Comparison of runs", words, [one for one in figures if one], tables)


def _quality(runs: Sequence[RunData]) -> tuple["_Quality", list[str]]:
    """By what the runs can be compared, and a word on it."""
    shared = shared_metric(runs)
    if shared is None:
        losses = {run.name: Point(run.name, loss) for run in runs if (loss := run.figure("eval_loss")) is not None}
        if not held_out_alike(runs):
            return _Quality("held-out loss", {}), [
                "The runs held out different rows, so their losses cannot be compared. `siftune eval RUN… --data "
                "FILE` measures them on the same rows."
            ]
        return _Quality("held-out loss", losses), ["Quality is the held-out loss, which has no interval here."]
    data, metric = shared
    points = {}
    for run in runs:
        row = measured(run, data, metric)
        if row.tuned is not None:
            points[run.name] = Point(run.name, row.tuned, *(row.tuned_interval or (None, None)))
    base = measured(runs[0], data, metric).base
    label = label_of(metric)
    words = (
        f"Quality: {label} on {data}; the base model has {value_text(metric, base)}. Bars are "
        f"{level_text(runs[0], data)} intervals over rows."
    )
    return _Quality(label, points, metric), [words]


@dataclass(frozen=True)
class _Quality:
    """What runs are compared by."""

    label: str
    points: dict[str, Point]  # name of a run -> its value
    metric: str = ""  # "" for a loss

    @property
    def is_rate(self) -> bool:
        """Whether it is a share, of which more is better."""
        return self.metric not in ("", PERPLEXITY)

    def text(self, name: str) -> str:
        """The value of a run, as text."""
        if name not in self.points:
            return "–"
        value = self.points[name].value
        return value_text(self.metric, value) if self.is_rate else short(value, 4)


def _against(quality: _Quality, runs: Sequence[RunData], key: str, title: str, label: str) -> Figure | None:
    points = [
        Point(run.name, point.value, point.low, point.high, x, number)
        for number, run in enumerate(runs)
        if key != "seconds" or run.figure("resumed_step") is None  # a resumed run records a part of its time
        if (x := run.figure(key)) is not None and (point := quality.points.get(run.name)) is not None
    ]
    if not points:
        return None
    better = "up and left is better" if quality.is_rate else "down and left is better"
    scale = Scale(quality.label, percent=quality.is_rate)
    return scatter(key.replace("_", "-"), title, points, (label, scale), f"{better.capitalize()}.")


def _table(runs: Sequence[RunData], quality: _Quality) -> Grid:
    header = ["run", "method", quality.label, "interval", "time", "peak memory", "steps", "status"]
    rows = [_run_row(run, quality) for run in runs]
    return Grid(header, rows, words=(0, 1, 7))


def _run_row(run: RunData, quality: _Quality) -> list[Cell]:
    point = quality.points.get(run.name)
    interval = "–"
    if point is not None and point.low is not None and point.high is not None:
        interval = f"{value_text(quality.metric, point.low)} to {value_text(quality.metric, point.high)}"
    seconds, peak, steps = (run.figure(name) for name in ("seconds", "peak_memory_mb", "steps"))
    return [
        Cell(run.name),
        Cell(run.recipe.method),
        Cell(quality.text(run.name), point.value if point else None),
        Cell(interval, point.low if point else None),
        Cell(run.time, seconds),
        Cell(memory(peak), peak),
        Cell("–" if steps is None else f"{steps:,.0f}", steps),
        Cell(run.status),
    ]


def _differences(runs: Sequence[RunData]) -> Grid:
    """Settings in which the recipes differ, without those of a method that only one run uses."""
    values = [_flat(recipe_values(run.recipe)) for run in runs]
    names = [name for name in dict.fromkeys(key for one in values for key in one) if name not in _OUTSIDE]
    rows = []
    for name in names:
        known = [one[name] for one in values if name in one]
        if len(set(map(str, known))) > 1:
            rows.append([Cell(name), *(Cell(_setting(one.get(name))) for one in values)])
    header = ["setting", *(run.name for run in runs)]
    caption = "Differences between the recipes." if rows else "The recipes do not differ."
    return Grid(header, rows, caption, range(len(header)))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a method under its name and a dot."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _setting(value: Any) -> str:
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
