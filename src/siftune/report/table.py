"""A table of metrics, base against tuned, for a terminal, a file or JSON."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_LABELS = {
    "choices": "multiple choice",
    "choices_per_token": "multiple choice, per token",
    "exact_match": "exact match",
    "perplexity": "perplexity",
}


@dataclass(frozen=True)
class TableRow:
    """One metric of one or two models.

    Attributes:
        metric: Its name.
        rows: How many rows it was measured on.
        base: The base model's value: a rate between 0 and 1, or a perplexity.
        tuned: The tuned model's value; None, like what follows, where there is no tuned model.
        difference: tuned − base.
        low: Lower bound of the difference's paired bootstrap interval.
        high: Upper bound.
        base_interval: Wilson's interval of the base's rate; None for perplexity.
        tuned_interval: The same of the tuned model's.
    """

    metric: str
    rows: int
    base: float
    tuned: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    base_interval: tuple[float, float] | None = None
    tuned_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class ResultTable:
    """Metrics of one or two models.

    Attributes:
        title: What was measured.
        rows: One per metric.
        level: Coverage of the intervals.
    """

    title: str
    rows: list[TableRow]
    level: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """The table in plain types, for JSON."""
        return asdict(self)

    def cells(self) -> list[list[str]]:
        """The header and the rows as texts; rates in percent, their differences in points."""
        interval = f"{100 * self.level:g} % interval"
        if all(row.tuned is None for row in self.rows):
            return [["metric", "rows", "value", interval], *map(_single, self.rows)]
        return [["metric", "rows", "base", "tuned", "difference", interval], *map(_pair, self.rows)]


def rich_table(table: ResultTable) -> "Table":
    """Lay a table out for the terminal."""
    from rich.table import Table

    header, *rows = table.cells()
    laid_out = Table(title=table.title, title_justify="left")
    for i, name in enumerate(header):
        laid_out.add_column(name, justify="right" if i else "left")
    for cells in rows:
        laid_out.add_row(*cells)
    return laid_out


def plain_table(table: ResultTable) -> str:
    """Write a table as lines of text in columns, the title first."""
    cells = table.cells()
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for first, *others in cells:
        aligned = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join([table.title, *lines])


def _single(row: TableRow) -> list[str]:
    show = _value(row.metric)
    interval = "" if row.base_interval is None else " to ".join(map(show, row.base_interval))
    return [_label(row), str(row.rows), show(row.base), interval]


def _pair(row: TableRow) -> list[str]:
    show, change = _value(row.metric), _change(row.metric)
    numbers = (row.tuned, row.difference, row.low, row.high)
    tuned, difference, low, high = (float("nan") if number is None else number for number in numbers)
    interval = f"{change(low)} to {change(high)}"
    return [_label(row), str(row.rows), show(row.base), show(tuned), change(difference), interval]


def _label(row: TableRow) -> str:
    return _LABELS.get(row.metric, row.metric)


def _value(metric: str) -> Callable[[float], str]:
    if metric == "perplexity":
        return lambda value: f"{value:.4g}"
    return lambda value: f"{100 * value:.1f} %"


def _change(metric: str) -> Callable[[float], str]:
    if metric == "perplexity":
        return lambda value: f"{value:+.3g}"
    return lambda value: f"{100 * value:+.1f}"
