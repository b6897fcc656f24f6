"""Several runs side by side: quality against time and memory, and in what their recipes differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from siftune.evaluate.measure import PERPLEXITY
from siftune.recipe.read import recipe_values
from siftune.report.metrics import label_of
from siftune.report.page.figure import Figure
from siftune.report.page.points import Point, Scale, scatter
from siftune.report.page.quality import held_out_alike, level_text, measured, shared_metric, value_text
from siftune.report.page.section import Cell, Grid, Section
from siftune.report.page.subjects import RunData
from siftune.report.page.words import memory, short

_OUTSIDE = {"out", "resume", "report_to"}  # settings that change nothing of what is learned


def compare_runs(runs: Sequence[RunData]) -> Section | None:
    """Quality, time and memory of all runs; None for a single one."""
    if len(runs) < 2:
        return None
    quality, words = _quality(runs)
    figures = [
        _against(quality, runs, "seconds", "Quality and time", "seconds of training"),
        _against(quality, runs, "peak_memory_mb", "Quality and memory", "peak memory, 10⁶ bytes"),
    ]
    tables = [_table(runs, quality), _differences(runs)]
    return Section("compare", "The runs side by side", words, [one for one in figures if one], tables)


def _quality(runs: Sequence[RunData]) -> tuple["_Quality", list[str]]:
    """By what the runs can be compared, and a word on it."""
    shared = shared_metric(runs)
    if shared is None:
        losses = {run.name: Point(run.name, loss) for run in runs if (loss := run.figure("eval_loss")) is not None}
        if not held_out_alike(runs):
            return _Quality("held-out loss", {}), [
                "The runs held out different rows, so that their losses can't be compared: `siftune eval RUN… --data "
                "FILE` measures them on the same."
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
        """A run's value in words."""
        if name not in self.points:
            return "–"
        value = self.points[name].value
        return value_text(self.metric, value) if self.is_rate else short(value, 4)


def _against(quality: _Quality, runs: Sequence[RunData], key: str, title: str, label: str) -> Figure | None:
    points = [
        Point(run.name, point.value, point.low, point.high, x, number)
        for number, run in enumerate(runs)
        if key != "seconds" or run.figure("resumed_step") is None  # of runs that went on a part of the time is known
        if (x := run.figure(key)) is not None and (point := quality.points.get(run.name)) is not None
    ]
    if not points:
        return None
    better = "up and left is better" if quality.is_rate else "down and left is better"
    scale = Scale(quality.label, percent=quality.is_rate)
    return scatter(key.replace("_", "-"), title, points, (label, scale), f"{better.capitalize()}.")


def _table(runs: Sequence[RunData], quality: _Quality) -> Grid:
    header = ["run", "method", quality.label, "interval", "time", "peak memory", "steps", "status"]
    rows = [_row(run, quality) for run in runs]
    return Grid(header, rows, words=(0, 1, 7))


def _row(run: RunData, quality: _Quality) -> list[Cell]:
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
    """Settings in which the recipes differ; those of a method that one run alone has stand in its recipe."""
    values = [_flat(recipe_values(run.recipe)) for run in runs]
    names = [name for name in dict.fromkeys(key for one in values for key in one) if name not in _OUTSIDE]
    rows = []
    for name in names:
        known = [one[name] for one in values if name in one]
        if len(set(map(str, known))) > 1:
            rows.append([Cell(name), *(Cell(_shown(one.get(name))) for one in values)])
    header = ["setting", *(run.name for run in runs)]
    caption = "In what the recipes differ." if rows else "The recipes do not differ in anything that is learned."
    return Grid(header, rows, caption, range(len(header)))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of a method under its name and a dot."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
