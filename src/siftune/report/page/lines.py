"""Lines over steps, each named at its end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from siftune.report.page.axes import BOLD, Plot, room, spread, x_axis, y_axis
from siftune.report.page.figure import Figure, Size, canvas
from siftune.report.page.svg import path, tag
from siftune.report.page.words import cut

COLOURS = 6
_MOST = 300  # points of a line; more are averaged
_NAME = 15  # letters of a name at a line's end


@dataclass(frozen=True)
class Line:
    """A line."""

    name: str  # what stands at its end
    xs: Sequence[float]  # steps, ascending
    ys: Sequence[float]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """How lines are drawn."""

    y_label: str  # what the values are, with their unit
    x_label: str = "optimizer step"
    zero: bool = False  # begin there
    percent: bool = False  # the values are shares


def line_chart(
    name: str, title: str, lines: Sequence[Line], chart: Chart, note: str = "", size: Size = "third"
) -> Figure:
    """Draw lines; values that are not finite are left out, and lines without any."""
    kept = [thin for thin in map(_thinned, lines) if thin.xs]
    hover = {
        "kind": "lines",
        "x": sorted({x for line in kept for x in line.xs}),
        "lines": [[line.name, list(line.xs), [_rounded(y) for y in line.ys]] for line in kept],
        "percent": chart.percent,
    }

    return Figure(name, title, lambda width: _draw(width, title, kept, chart), note, size, hover if kept else None)


def _draw(width: int, title: str, lines: Sequence[Line], chart: Chart) -> Markup:
    if not lines:
        return canvas(width, 60, title, tag("text", "nothing was recorded", x=0.0, y=34.0, class_="axis"))
    names = [cut(line.name, _NAME) for line in lines]
    right = 12 + BOLD * max(map(len, names))
    xs, ys = [x for line in lines for x in line.xs], [y for line in lines for y in line.ys]
    across = (min(xs), max(xs)) if max(xs) > min(xs) else (min(0.0, xs[0]), max(1.0, xs[0]))  # a single step
    plot = Plot(44, 20, width - 44 - right, 150, across, room(ys, chart.zero))
    ends = spread([plot.at_y(line.ys[-1]) for line in lines], 13, plot.top, plot.top + plot.height)
    parts = [*y_axis(plot, chart.y_label, percent=chart.percent), *x_axis(plot, chart.x_label)]
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
