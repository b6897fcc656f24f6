"""Metrics as a table: rates in percent, their differences in points, perplexities as they are."""

from collections.abc import Callable, Sequence

from siftune.evaluate.measure import PERPLEXITY, MetricRow
from siftune.report.table import Table

_LABELS = {
    "choices": "multiple choice",
    "choices_per_token": "multiple choice, per token",
    "exact_match": "exact match",
}


def metric_table(
    title: str, rows: Sequence[MetricRow], level: float = 0.95, names: tuple[str, str] = ("base", "tuned")
) -> Table:
    """Make a table of the metrics of one model, or of a base model against a tuned one.

    `rows` are those of `compare`, `level` is the coverage of their intervals, `names` what the two models are called.
    """
    interval = f"{100 * level:g} % interval"
    if all(row.tuned is None for row in rows):
        return Table(["metric", "rows", "value", interval], [_single(row) for row in rows], title)
    header = ["metric", "rows", *names, "difference", interval]
    return Table(header, [_pair(row) for row in rows], title)


def _single(row: MetricRow) -> list[str]:
    show = _value(row.metric)
    interval = "" if row.base_interval is None else " to ".join(map(show, row.base_interval))
    return [label_of(row.metric), str(row.rows), show(row.base), interval]


def _pair(row: MetricRow) -> list[str]:
    show, change = _value(row.metric), _change(row.metric)
    numbers = (row.tuned, row.difference, row.low, row.high)
    tuned, difference, low, high = (float("nan") if number is None else number for number in numbers)
    interval = f"{change(low)} to {change(high)}"
    return [label_of(row.metric), str(row.rows), show(row.base), show(tuned), change(difference), interval]


def label_of(metric: str) -> str:
    """What a metric is called."""
    return _LABELS.get(metric, metric)


def _value(metric: str) -> Callable[[float], str]:
    if metric == PERPLEXITY:
        return lambda value: f"{value:.4g}"
    return lambda value: f"{100 * value:.1f} %"


def _change(metric: str) -> Callable[[float], str]:
    if metric == PERPLEXITY:
        return lambda value: f"{value:+.3g}"
    return lambda value: f"{100 * value:+.1f}"
