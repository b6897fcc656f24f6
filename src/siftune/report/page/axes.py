"""A plot's area and axes: from values to pixels, and the lines and texts around."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from siftune.report.page.svg import tag
from siftune.report.page.words import percent_texts, tick_texts, ticks

LETTER, BOLD = 6.2, 7.2  # pixels that a letter takes, more or less


@dataclass(frozen=True)
class Plot:
    """The area that data are drawn in."""

    left: float  # its left edge, in pixels
    top: float  # its upper edge
    width: float  # pixels across
    height: float  # pixels down
    x: tuple[float, float]  # values at its left and right edge
    y: tuple[float, float]  # values at its lower and upper edge

    def at_x(self, value: float) -> float:
        """Where a value stands across."""
        low, high = self.x
        return self.left + self.width * (value - low) / (high - low)

    def at_y(self, value: float) -> float:
        """Where a value stands down."""
        low, high = self.y
        return self.top + self.height * (high - value) / (high - low)


def room(values: Sequence[float], zero: bool = False) -> tuple[float, float]:
    """Bounds with a little room around values; from zero where it is to be seen."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = min(0.0, low) if zero else low
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if zero and low == 0 else low - margin), high + margin


def y_axis(plot: Plot, label: str, percent: bool = False) -> list[Markup]:
    """Lines across with their values on the left, and what they are of above."""
    values = ticks(*plot.y)
    texts = percent_texts(values) if percent else tick_texts(values)
    parts = [tag("text", label, x=0.0, y=10.0, class_="axis")]
    for value, text in zip(values, texts, strict=True):
        y = plot.at_y(value)
        parts.append(tag("line", x1=plot.left, x2=plot.left + plot.width, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", text, x=plot.left - 6, y=y + 3.5, class_="tick end"))
    return parts


def x_axis(plot: Plot, label: str, texts: Mapping[float, str] | None = None) -> list[Markup]:
    """Values below, by default round ones, and what they are of."""
    values, bottom = ticks(*plot.x), plot.top + plot.height
    texts = dict(zip(values, tick_texts(values), strict=True)) if texts is None else texts
    parts = [tag("line", x1=plot.left, x2=plot.left + plot.width, y1=bottom, y2=bottom, class_="base")]
    for value, text in texts.items():
        parts.append(tag("text", text, x=plot.at_x(value), y=bottom + 15, class_="tick middle"))
    return [*parts, tag("text", label, x=plot.left + plot.width, y=bottom + 29, class_="axis end")]


def spread(places: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Move places apart until they are `least` pixels from each other, between two bounds where there is room.

    Example:
        >>> spread([10, 12, 40], 10, 0, 100)
        [10, 20, 40]
    """
    order = sorted(range(len(places)), key=lambda number: places[number])
    moved = list(places)
    for before, now in pairwise(order):
        moved[now] = max(moved[now], moved[before] + least)
    if order and moved[order[-1]] > high:
        moved[order[-1]] = high
        for after, now in pairwise(order[::-1]):
            moved[now] = min(moved[now], moved[after] - least)
    return [max(low, place) for place in moved]
