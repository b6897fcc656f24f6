"""Points with intervals: down a list of names, or one value against another."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from siftune.report.page.axes import BOLD, LETTER, Plot, room, spread, x_axis, y_axis
from siftune.report.page.figure import Figure, Size, canvas
from siftune.report.page.lines import COLOURS
from siftune.report.page.svg import path, tag
from siftune.report.page.words import cut, percent, percent_texts, short, tick_texts, ticks

_NAME = 24


@dataclass(frozen=True)
class Point:
    """A value."""

    name: str  # whose it is
    value: float
    low: float | None = None  # bounds of its interval; None where it has none
    high: float | None = None
    x: float = 0.0  # what it stands against, in `scatter`
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
    reference: float | None = None  # a value to compare with, drawn as a line
    reference_name: str = ""

    def text(self, value: float) -> str:
        """A value in words."""
        return percent(value) if self.percent else short(value)


def listed_points(
    name: str, title: str, points: Sequence[Point], scale: Scale, note: str = "", size: Size = "half"
) -> Figure:
    """Draw a line for each point: its name, its interval and its value in figures."""
    return Figure(name, title, lambda width: _draw_list(width, title, points, scale), note, size)


def scatter(
    name: str, title: str, points: Sequence[Point], axes: tuple[str, Scale], note: str, size: Size = "half",
    front: Sequence[Point] = (),
) -> Figure:  # fmt: skip
    """Draw values against others, each named beside it; a line through those in `front`."""
    return Figure(name, title, lambda width: _draw_scatter(width, title, points, axes, front), note, size)


def _draw_list(width: int, title: str, points: Sequence[Point], scale: Scale) -> Markup:
    names = [cut(point.name, _NAME) for point in points]
    left, right = 12 + LETTER * max(map(len, names)), 58.0
    values = [value for point in points for value in point.bounds]
    values += [] if scale.reference is None else [scale.reference]
    plot = Plot(left, 26, width - left - right, 24.0 * len(points), room(values), (0, 1))
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
    """Values below the list with lines upwards, and what to compare with."""
    values, bottom = ticks(*plot.x), plot.top + plot.height
    texts = percent_texts(values) if scale.percent else tick_texts(values)
    parts = []
    for value, text in zip(values, texts, strict=True):
        x = plot.at_x(value)
        parts.append(tag("line", x1=x, x2=x, y1=plot.top, y2=bottom, class_="grid"))
        parts.append(tag("text", text, x=x, y=bottom + 15, class_="tick middle"))
    if scale.reference is not None:
        x = plot.at_x(scale.reference)
        parts.append(tag("line", x1=x, x2=x, y1=plot.top - 2, y2=bottom, class_="reference"))
        parts.append(tag("text", scale.reference_name, x=x, y=plot.top - 6, class_="tick middle"))
    return parts


def _draw_scatter(
    width: int, title: str, points: Sequence[Point], axes: tuple[str, Scale], front: Sequence[Point]
) -> Markup:
    x_label, scale = axes
    names = [cut(point.name, _NAME) for point in points]
    values = [value for point in points for value in point.bounds]
    plot = Plot(44, 20, width - 54.0, 200, _wide([point.x for point in points]), room(values))
    parts = [*y_axis(plot, scale.label, percent=scale.percent), *x_axis(plot, x_label)]
    if len(front) > 1:
        line = path([(plot.at_x(point.x), plot.at_y(point.value)) for point in front])
        parts.append(tag("path", d=line, class_="line front"))
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
    low, high = min(values), max(values)
    margin = 0.15 * (high - low) or 0.2 * abs(high) or 1.0
    return low - margin, high + margin
