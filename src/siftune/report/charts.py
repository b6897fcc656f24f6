"""Charts as SVG: axes, lines over steps, points with intervals, histograms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from siftune.report.parts import Figure, canvas, number, path, tag
from siftune.report.words import cut, percent, percent_texts, short, tick_texts, ticks

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
        """Horizontal position of a value, in pixels."""
        low, high = self.x
        return self.left + self.width * (value - low) / (high - low)

    def at_y(self, value: float) -> float:
        """Vertical position of a value, in pixels."""
        low, high = self.y
        return self.top + self.height * (high - value) / (high - low)


_LEAST = 0.1  # of the largest value: the smallest range of an axis, so that noise does not look like a trend (ours)


def room(values: Sequence[float], zero: bool = False, percent: bool = False) -> tuple[float, float]:
    """Bounds with a little room around values, from zero if asked; at least a tenth of the largest value apart.

    Bounds of shares (`percent`) are at least 10 points apart.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = min(0.0, low) if zero else low
    least = _LEAST if percent else _LEAST * max(abs(low), abs(high)) or 1.0
    margin = 0.06 * (high - low)
    if high - low < least:
        middle, bottom = (low + high) / 2, 0.0 if (zero or percent) and low >= 0 else -math.inf
        low = max(middle - least / 2, bottom)
        low, high, margin = low, low + least, 0.0
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


def x_axis(plot: Plot, label: str) -> list[Markup]:
    """Round values below, and what they are of."""
    values, bottom = ticks(*plot.x), plot.top + plot.height
    parts = [tag("line", x1=plot.left, x2=plot.left + plot.width, y1=bottom, y2=bottom, class_="base")]
    for value, text in zip(values, tick_texts(values), strict=True):
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


COLOURS = 6
_MOST = 300  # points of a line; more are averaged
_NAME_AT_END = 15  # letters of a name at a line's end


@dataclass(frozen=True)
class Line:
    """A line."""

    name: str  # label at its end
    xs: Sequence[float]  # steps, ascending
    ys: Sequence[float]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """How lines are drawn."""

    y_label: str  # what the values are, with their unit
    zero: bool = False  # begin there


def line_chart(title: str, lines: Sequence[Line], chart: Chart, note: str = "") -> Figure:
    """Draw lines; values that are not finite are left out, and lines without any."""
    lines = [thin for thin in map(_thinned, lines) if thin.xs]
    hover = {
        "x": sorted({x for line in lines for x in line.xs}),
        "lines": [[line.name, list(line.xs), [_rounded(y) for y in line.ys]] for line in lines],
    }
    return Figure(title, lambda width: _draw_lines(width, title, lines, chart), note, hover=hover if lines else None)


def _draw_lines(width: int, title: str, lines: Sequence[Line], chart: Chart) -> Markup:
    if not lines:
        return canvas(width, 60, title, tag("text", "nothing was recorded", x=0.0, y=34.0, class_="axis"))
    names = [cut(line.name, _NAME_AT_END) for line in lines]
    right = 12 + BOLD * max(map(len, names))
    xs, ys = [x for line in lines for x in line.xs], [y for line in lines for y in line.ys]
    across = (min(xs), max(xs)) if max(xs) > min(xs) else (min(0.0, xs[0]), max(1.0, xs[0]))  # a single step
    plot = Plot(44, 20, width - 44 - right, 150, across, room(ys, chart.zero))
    ends = spread([plot.at_y(line.ys[-1]) for line in lines], 13, plot.top, plot.top + plot.height)
    parts = [*y_axis(plot, chart.y_label), *x_axis(plot, "optimizer step")]
    for line, name, end in zip(lines, names, ends, strict=True):
        kind = f"c{line.colour % COLOURS}"
        dashes = " dashed" if line.dashed else ""
        places = [(plot.at_x(x), plot.at_y(y)) for x, y in zip(line.xs, line.ys, strict=True)]
        if len(places) > 1:
            parts.append(tag("path", d=path(places), class_=f"line {kind}{dashes}"))
        parts.append(tag("circle", cx=places[-1][0], cy=places[-1][1], r=2.5, class_=f"dot {kind}"))
        parts.append(tag("text", name, x=plot.left + plot.width + 7, y=end + 4, class_=f"name {kind}"))
    area = tag("rect", x=plot.left, y=plot.top, width=plot.width, height=plot.height, class_="hit")
    return canvas(width, plot.top + plot.height + 34, title, *parts, area)


def _thinned(line: Line) -> Line:
    """The line with finite values alone, and no more points than can be seen: means of neighbours."""
    pairs = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
    if len(pairs) > _MOST:
        parts = np.array_split(np.array(pairs), _MOST)
        pairs = [(float(part[-1, 0]), float(part[:, 1].mean())) for part in parts]
    return Line(line.name, [x for x, _ in pairs], [y for _, y in pairs], line.colour, line.dashed)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


_NAME = 24


@dataclass(frozen=True)
class Point:
    """A value."""

    name: str  # whose it is
    value: float
    low: float | None = None  # bounds of its interval; None where it has none
    high: float | None = None
    x: float = 0.0  # horizontal value, in `scatter`
    colour: int = 0

    @property
    def bounds(self) -> tuple[float, ...]:
        """The value, and its interval's ends where it has one."""
        return tuple(one for one in (self.value, self.low, self.high) if one is not None)


@dataclass(frozen=True)
class Scale:
    """How values are written, and where they begin."""

    label: str  # what they are, with their unit
    percent: bool = False  # they are shares

    def text(self, value: float) -> str:
        """A value as text."""
        return percent(value) if self.percent else short(value)


def listed_points(title: str, points: Sequence[Point], scale: Scale) -> Figure:
    """Draw a line for each point: its name, its interval and its value in figures."""
    return Figure(title, lambda width: _draw_list(width, title, points, scale), size="third")


def scatter(title: str, points: Sequence[Point], axes: tuple[str, Scale], note: str) -> Figure:
    """Draw values against others, each named beside it."""
    return Figure(title, lambda width: _draw_scatter(width, title, points, axes), note, "half")


def _draw_list(width: int, title: str, points: Sequence[Point], scale: Scale) -> Markup:
    names = [cut(point.name, _NAME) for point in points]
    left, right = 12 + LETTER * max(map(len, names)), 58.0
    values = [value for point in points for value in point.bounds]
    plot = Plot(left, 26, width - left - right, 24.0 * len(points), room(values, percent=scale.percent), (0, 1))
    parts = [tag("text", scale.label, x=0.0, y=10.0, class_="axis"), *_scale_below(plot, scale)]
    for row, (point, label) in enumerate(zip(points, names, strict=True)):
        y, kind = plot.top + 24 * row + 12, f"c{point.colour % COLOURS}"
        parts.append(tag("text", label, x=0.0, y=y + 4, class_="label"))
        if point.low is not None and point.high is not None:
            ends = plot.at_x(point.low), plot.at_x(point.high)
            parts.append(tag("line", x1=ends[0], x2=ends[1], y1=y, y2=y, class_=f"interval {kind}"))
        parts.append(tag("circle", cx=plot.at_x(point.value), cy=y, r=4.0, class_=f"dot {kind}"))
        parts.append(tag("text", scale.text(point.value), x=float(width), y=y + 4, class_="label end"))
    return canvas(width, plot.top + plot.height + 24, title, *parts)


def _scale_below(plot: Plot, scale: Scale) -> list[Markup]:
    """Values below the list with lines upwards."""
    values, bottom = ticks(*plot.x), plot.top + plot.height
    texts = percent_texts(values) if scale.percent else tick_texts(values)
    parts = []
    for value, text in zip(values, texts, strict=True):
        x = plot.at_x(value)
        parts.append(tag("line", x1=x, x2=x, y1=plot.top, y2=bottom, class_="grid"))
        parts.append(tag("text", text, x=x, y=bottom + 15, class_="tick middle"))
    return parts


def _draw_scatter(width: int, title: str, points: Sequence[Point], axes: tuple[str, Scale]) -> Markup:
    x_label, scale = axes
    names = [cut(point.name, _NAME) for point in points]
    values = [value for point in points for value in point.bounds]
    plot = Plot(44, 20, width - 54.0, 200, _wide([point.x for point in points]), room(values, percent=scale.percent))
    parts = [*y_axis(plot, scale.label, percent=scale.percent), *x_axis(plot, x_label)]
    heights = spread([plot.at_y(point.value) for point in points], 12, plot.top, plot.top + plot.height)
    for point, label, height in zip(points, names, heights, strict=True):
        x, y, kind = plot.at_x(point.x), plot.at_y(point.value), f"c{point.colour % COLOURS}"
        if point.low is not None and point.high is not None:
            ends = plot.at_y(point.low), plot.at_y(point.high)
            parts.append(tag("line", x1=x, x2=x, y1=ends[0], y2=ends[1], class_=f"interval {kind}"))
        parts.append(tag("circle", cx=x, cy=y, r=4.0, class_=f"dot {kind}"))
        inside = x < plot.left + plot.width - 12 - BOLD * len(label)
        parts.append(
            tag(
                "text",
                label,
                x=x + (8 if inside else -8),
                y=height + 4,
                class_=f"name {kind}{'' if inside else ' end'}",
            )
        )
    return canvas(width, plot.top + plot.height + 34, title, *parts)


def _wide(values: Sequence[float]) -> tuple[float, float]:
    """Bounds with room for names beside the points."""
    low, high = room(values)
    margin = 0.1 * (high - low)
    return low - margin, high + margin


_BINS = 40
_BEYOND = 0.005  # share of the values beyond either end of the axis, which are in the first and the last bar


@dataclass(frozen=True)
class Part:
    """Values that a histogram draws in one colour."""

    name: str
    values: Sequence[float]
    colour: int


def histogram(
    title: str, parts: tuple[Part, Part], axes: tuple[str, str], limit: float | None = None, note: str = ""
) -> Figure:
    """Draw the numbers of values as bars, those of the second part on top of the first; at least one value.

    Args:
        title: What the values are.
        parts: The first is named on the left, the second on the right.
        axes: What is across, and what is up.
        limit: Where a vertical line divides two bars.
        note: How to read it.
    """
    return Figure(title, lambda width: _draw_histogram(width, title, parts, axes, limit), note, "half")


def _draw_histogram(
    width: int, title: str, parts: tuple[Part, Part], axes: tuple[str, str], limit: float | None
) -> Markup:
    edges = _edges(np.concatenate([part.values for part in parts]), limit)
    counts = np.stack([np.histogram(np.clip(part.values, edges[0], edges[-1]), edges)[0] for part in parts])
    highest = max(1.15 * float(counts.sum(0).max()), 4.0)  # with room for the limit's name
    plot = Plot(44, 34, width - 54.0, 150, (edges[0], edges[-1]), (0, highest))
    drawn = [*y_axis(plot, axes[1]), *x_axis(plot, axes[0])]
    below = [np.zeros_like(counts[0]), counts[0]]
    places = ((plot.left, ""), (plot.left + plot.width, " end"))
    for part, low, own, (x, side) in zip(parts, below, counts, places, strict=True):
        drawn.append(tag("path", d=_bars(plot, edges, low, own), class_=f"dot c{part.colour}"))
        name = f"{part.name}: {len(part.values):,}"
        drawn.append(tag("text", name, x=x, y=26.0, class_=f"name c{part.colour}{side}"))
    if limit is not None:
        x, before = plot.at_x(limit), limit > (edges[0] + edges[-1]) / 2  # its name is on the wider side
        ends = [(x, plot.top), (x, plot.top + plot.height)]
        drawn.append(tag("path", d=path(ends), class_=f"line c{COLOURS - 1} dashed"))
        place, side = (x - 5, " end") if before else (x + 5, "")
        drawn.append(tag("text", "limit", x=place, y=plot.top + 10, class_=f"label{side}"))
    return canvas(width, plot.top + plot.height + 34, title, *drawn)


def _bars(plot: Plot, edges: Sequence[float], low: NDArray[np.int64], counts: NDArray[np.int64]) -> str:
    """Bars with a small gap, as the attribute `d` of a path."""
    return "".join(
        f"M{number(plot.at_x(left))} {number(plot.at_y(bottom))}V{number(plot.at_y(bottom + count))}"
        f"H{number(plot.at_x(right) - 0.5)}V{number(plot.at_y(bottom))}z"
        for (left, right), bottom, count in zip(pairwise(edges), low, counts, strict=True)
        if count
    )


def _edges(values: NDArray[np.float64], limit: float | None) -> list[float]:
    """Edges of the bars, ascending; the limit is one of them."""
    low, high = np.quantile(values, [_BEYOND, 1 - _BEYOND]).tolist()
    fixed = low if limit is None else limit
    low, high = min(low, fixed), max(high, fixed)
    step = (high - low) / _BINS or 1.0
    before, after = math.ceil((fixed - low) / step - 1e-9), math.ceil((high - fixed) / step - 1e-9)
    return [fixed + place * step for place in range(-before, max(after, 1 - before) + 1)]
