"""The result as a sentence, and several runs side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siftune.base.text import counted, short_names
from siftune.evaluate.measure import PERPLEXITY
from siftune.recipe.read import recipe_values
from siftune.report.charts import Point, Scale, scatter
from siftune.report.comparable import Basis, basis_of, level_text, measured, others_text
from siftune.report.evals import change_text, label_of, value_text
from siftune.report.parts import Cell, Figure, Grid, Section
from siftune.report.subjects import RunData, Subjects
from siftune.report.words import data_name, listed, memory, percent, short


def headline(subjects: Subjects) -> str:
    """What came out, in a sentence."""
    if len(subjects.runs) == 1:
        return _result_of_run(subjects.runs[0])
    if subjects.runs:
        return _result_of_runs(subjects.runs)
    if subjects.siftings:
        rows = subjects.siftings[0].decisions.rows
        selected = sum(row.selected for row in rows)
        return (
            f"{selected:,} of {counted(len(rows), 'row')} of the pool are selected ({percent(selected / len(rows))})."
        )
    name, rows = subjects.lists[0][0], subjects.lists[0][1].rows
    return f"{name} leaves out {sum(not row.selected for row in rows):,} of its {counted(len(rows), 'row')}."


def _result_of_run(run: RunData) -> str:
    basis = basis_of([run])
    if run.status == "running":
        return _under_way(run)
    if not basis.metric:
        return _by_loss(run)
    row = measured(run, basis)
    if row.tuned is None or row.difference is None or row.low is None or row.high is None:
        return _by_loss(run)
    base, tuned = (value_text(row.metric, value) for value in (row.base, row.tuned))
    change, low, high = (change_text(row.metric, value) for value in (row.difference, row.low, row.high))
    unit = "" if row.metric == PERPLEXITY else " points"
    return (
        f"On {counted(row.rows, 'held-out row')}, {label_of(row.metric)} went from {base} to {tuned}: {change}{unit}, "
        f"{level_text(run, basis)} interval {low} to {high}."
    )


def _under_way(run: RunData) -> str:
    steps, losses = run.course("loss")
    if not losses:
        return f"“{run.name}” has no logged step yet."
    total = f" of {run.recipe.steps:,}" if run.recipe.steps else ""
    held_out = run.course("eval_loss")[1]
    ending = f", held-out loss {short(held_out[-1], 4)}" if held_out else ""
    return f"“{run.name}” is at step {steps[-1]:,.0f}{total}: training loss {short(losses[-1], 4)}{ending}."


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
    basis = basis_of(runs)
    if not basis.runs:
        return f"{len(runs)} runs, not measured on the same held-out rows."
    count = f"{len(runs)}" if len(basis.runs) == len(runs) else f"{len(basis.runs)} comparable"
    if not basis.metric:
        return _by_losses(basis, count)
    metric = basis.metric
    metrics = {run.name: measured(run, basis) for run in basis.runs}
    valued = {name: row.tuned for name, row in metrics.items() if row.tuned is not None}
    order = sorted(valued, key=lambda name: valued[name], reverse=metric != PERPLEXITY)
    best = metrics[order[0]]
    first = [name for name in order if valued[name] == valued[order[0]]]
    others = [f"{value_text(metric, valued[name])} for “{name}”" for name in order[len(first) :][:3]]
    if len({run.recipe.model for run in basis.runs}) == 1:
        others.append(f"{value_text(metric, best.base)} for the base model")
    interval = ""
    if best.tuned_interval is not None:
        level = level_text(next(run for run in runs if run.name == order[0]), basis)
        low, high = (value_text(metric, bound) for bound in best.tuned_interval)
        interval = f" ({level} interval {low} to {high})"
    names = listed([f"“{name}”" for name in first]) if len(first) < 5 else f"{len(first)} runs"
    verdict = f"{names} are equally good, the best" if len(first) > 1 else f"{names} is best"
    against = f", against {listed(others)}" if others else ""
    return (
        f"{verdict} of {count} runs: {value_text(metric, valued[order[0]])} "
        f"{label_of(metric)}{interval} on {counted(best.rows, 'held-out row')}{against}."
    )


def _by_losses(basis: Basis, count: str) -> str:
    losses = {run.name: loss for run in basis.runs if (loss := run.figure("eval_loss")) is not None}
    order = sorted(losses, key=lambda name: losses[name])
    others = ", ".join(f"{short(losses[name], 4)} for “{name}”" for name in order[1:4])
    return (
        f"“{order[0]}” has the lowest held-out loss of {count} runs, {short(losses[order[0]], 4)} nats per token, "
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
    """The values by which the runs are compared, and sentences on them."""
    basis = basis_of(runs)
    others = others_text(runs, basis)
    advice = [f"{others} `siftune eval RUN… --data FILE` measures runs on the same rows."] if others else []
    if not basis.metric:
        losses = {
            run.name: Point(run.name, loss) for run in basis.runs if (loss := run.figure("eval_loss")) is not None
        }
        words = ["Quality is the held-out loss, which has no interval here."] if losses else []
        return _Quality("held-out loss", losses), [*words, *advice]
    metric = basis.metric
    points = {}
    for run in basis.runs:
        row = measured(run, basis)
        if row.tuned is not None:
            points[run.name] = Point(run.name, row.tuned, *(row.tuned_interval or (None, None)))
    first = basis.runs[0]
    of_base = f"; the base model has {value_text(metric, measured(first, basis).base)}"
    if len({run.recipe.model for run in basis.runs}) > 1:
        of_base = ""
    bars = f"Bars are {level_text(first, basis)} intervals over rows."
    words = [f"Quality: {label_of(metric)} on {data_name(basis.data)}{of_base}. {bars}"]
    return _Quality(label_of(metric), points, metric), [*words, *advice]


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
    return scatter(title, points, (label, scale), f"{better.capitalize()}.")


def _table(runs: Sequence[RunData], quality: _Quality) -> Grid:
    header = ["run", "method", quality.label, "interval", "time", "peak memory", "steps", "status"]
    rows = [_run_row(run, quality) for run in runs]
    return Grid(header, rows, words=(0, 1, 7))


def _run_row(run: RunData, quality: _Quality) -> list[Cell]:
    point = quality.points.get(run.name)
    interval = "–"
    if point is not None and point.low is not None and point.high is not None:
        interval = f"{value_text(quality.metric, point.low)} to {value_text(quality.metric, point.high)}"
    peak, steps = (run.figure(name) for name in ("peak_memory_mb", "steps"))
    return [
        Cell(run.name),
        Cell(run.recipe.method),
        Cell(quality.text(run.name)),
        Cell(interval),
        Cell(run.time),
        Cell(memory(peak)),
        Cell("–" if steps is None else f"{steps:,.0f}"),
        Cell(run.status),
    ]


def _differences(runs: Sequence[RunData]) -> Grid:
    """Settings in which the recipes differ, without those of a method that only one run uses."""
    values = [_flat(recipe_values(run.recipe)) for run in runs]
    names = [name for name in dict.fromkeys(key for one in values for key in one) if name not in _OUTSIDE]
    rows = []
    for name in names:
        choices = [one[name] for one in values if name in one]
        if len(set(map(str, choices))) > 1:
            rows.append([Cell(name), *map(Cell, _settings([one.get(name) for one in values]))])
    header = ["setting", *(run.name for run in runs)]
    caption = "Differences between the recipes." if rows else "The recipes do not differ."
    return Grid(header, rows, caption, range(len(header)))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a method under its name and a dot."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _settings(values: Sequence[Any]) -> list[str]:
    """Values of a setting as text: files by their names, with the folders that distinguish them."""
    lists = [value if isinstance(value, list) else [value] for value in values]
    paths = [part for parts in lists for part in parts if isinstance(part, str) and Path(part).is_absolute()]
    texts: dict[str, str] = dict(zip(paths, short_names([Path(path) for path in paths]), strict=True))
    return [
        "–" if value is None else ", ".join(texts.get(str(part), str(part)) for part in parts)
        for value, parts in zip(values, lists, strict=True)
    ]  # fmt: skip
