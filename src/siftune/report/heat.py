"""Heat maps as SVG, with a few classes of colour that the theme of the page defines."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from siftune.report.charts import LETTER, Plot
from siftune.report.parts import Figure, Size, canvas, tag
from siftune.report.words import cut, short

_CLASSES = {"d": 9, "s": 8}  # diverging and sequential colours
LABEL = 13  # letters of a row's label
_KEY = 9  # pixels of a colour in the key


@dataclass(frozen=True, eq=False)
class Cells:
    """What a heat map shows."""

    values: NDArray[Any]  # (R, C) values, the first row at the top; NaN leaves a cell hatched
    rows: Sequence[str]  # R labels
    columns: Sequence[str]  # C labels
    low: float  # value of the first colour
    high: float  # value of the last one; where low is −high, zero is neutral
    x_label: str
    y_label: str
    unit: str
    marks: NDArray[np.bool_] | None = None  # (R, C), cells with a dot

    @property
    def kind(self) -> str:
        """Which colours: "d" away from zero, "s" from little to much."""
        return "d" if self.low < 0 else "s"


def heat_map(title: str, cells: Cells, note: str = "", size: Size = "third") -> Figure:
    """Draw cells."""
    hover = {
        "kind": "cells",
        "rows": list(cells.rows),
        "columns": list(cells.columns),
        "values": [[_rounded(value) for value in row] for row in cells.values],
        "labels": [cells.y_label, cells.x_label, cells.unit],
        "marks": None if cells.marks is None else [[int(mark) for mark in row] for row in cells.marks],
    }

    return Figure(title, lambda width: _draw(width, title, cells), note, size, hover)


def _draw(width: int, title: str, cells: Cells) -> Markup:
    rows, columns = cells.values.shape
    labels = [cut(label, LABEL) for label in cells.rows]
    left = 12 + LETTER * max(map(len, labels), default=0)
    height = min(17.0, 340 / rows) * rows
    plot = Plot(left, 24, width - left - 2, height, (0, columns), (0, rows))
    grid = tag(
        "g",
        *_paths(cells),
        transform=f"translate({left:.1f} {plot.top:.1f}) scale({plot.width / columns:.4f} {height / rows:.4f})",
        class_="cells",
    )
    parts = [tag("rect", x=left, y=plot.top, width=plot.width, height=height, class_="empty")]
    parts += [*_hatching(cells, plot), grid]
    parts += [*_marks(cells, plot), *_row_labels(labels, plot), *_column_labels(cells.columns, plot)]
    parts.append(tag("text", cells.y_label, x=0.0, y=10.0, class_="axis"))
    parts.append(tag("text", cells.x_label, x=left + plot.width, y=plot.top + height + 28, class_="axis end"))
    area = tag("rect", x=left, y=plot.top, width=plot.width, height=height, class_="hit")
    return canvas(width, plot.top + height + 34, title, *parts, *_key(cells, width), area)


def _paths(cells: Cells) -> list[Markup]:
    """A path for each colour, in which neighbours of a row are one rectangle; a cell is 1 by 1."""
    count = _CLASSES[cells.kind]
    shares = (cells.values - cells.low) / ((cells.high - cells.low) or 1.0)
    classes = np.where(np.isnan(shares), -1, np.clip(np.nan_to_num(shares) * count, 0, count - 1)).astype(int)
    drawn: dict[int, list[str]] = {}
    for y, row in enumerate(classes):
        starts = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
        for start, end in pairwise(starts):
            drawn.setdefault(int(row[start]), []).append(f"M{start} {y}h{end - start}v1h-{end - start}z")
    return [tag("path", d="".join(parts), class_=f"{cells.kind}{i}") for i, parts in sorted(drawn.items()) if i >= 0]


def _hatching(cells: Cells, plot: Plot) -> list[Markup]:
    """A stroke through each cell without a value, from its lower left to its upper right."""
    rows, columns = cells.values.shape
    across, down = plot.width / columns, plot.height / rows
    strokes = "".join(
        f"M{plot.left + x * across:.1f} {plot.top + (y + 1) * down:.1f}l{across:.1f} {-down:.1f}"
        for y, x in zip(*np.nonzero(np.isnan(cells.values)), strict=True)
    )
    return [tag("path", d=strokes, class_="hatch")] if strokes else []


def _marks(cells: Cells, plot: Plot) -> list[Markup]:
    if cells.marks is None:
        return []
    rows, columns = cells.marks.shape
    across, down = plot.width / columns, plot.height / rows
    radius = min(2.2, 0.24 * min(across, down))
    places = zip(*np.nonzero(cells.marks), strict=True)
    return [
        tag(
            "circle",
            cx=plot.left + (x + 0.5) * across,
            cy=plot.top + (y + 0.5) * down,
            r=f"{radius:.2f}",
            class_="mark",
        )
        for y, x in places
    ]


def _row_labels(labels: Sequence[str], plot: Plot) -> list[Markup]:
    """As many labels as there is room for, the last one among them: layer 0, as a rule."""
    down = plot.height / len(labels)
    every = _every(len(labels), int(plot.height // 12))
    shown = [number for number in range(len(labels)) if (len(labels) - 1 - number) % every == 0]
    return [
        tag("text", labels[i], x=plot.left - 6, y=plot.top + (i + 0.5) * down + 3.5, class_="tick end") for i in shown
    ]


def _column_labels(labels: Sequence[str], plot: Plot) -> list[Markup]:
    across = plot.width / len(labels)
    longest = max(map(len, labels))
    every = _every(len(labels), int(plot.width // (LETTER * longest + 14)))
    y = plot.top + plot.height + 14
    return [
        tag("text", labels[i], x=plot.left + (i + 0.5) * across, y=y, class_="tick middle")
        for i in range(0, len(labels), every)
    ]


def _every(count: int, most: int) -> int:
    """Which labels to show, every 1, 2, 5, 10, … so that there are no more than fit."""
    steps: list[int] = [part * 10**power for power in range(8) for part in (1, 2, 5)]
    return next(step for step in steps if count <= step * max(1, most))


def _key(cells: Cells, width: int) -> list[Markup]:
    """The colours from least to most, with the values at both ends, in the upper right."""
    count, high = _CLASSES[cells.kind], short(cells.high, 2)
    right = width - 2 - LETTER * len(high) - 4
    start = right - count * _KEY
    parts = [
        tag("rect", x=start + i * _KEY, y=4.0, width=_KEY, height=7, class_=f"{cells.kind}{i}") for i in range(count)
    ]
    parts.append(tag("text", high, x=right + 4, y=11.0, class_="tick"))
    return [*parts, tag("text", f"{cells.unit}  {short(cells.low, 2)}", x=start - 4, y=11.0, class_="tick end")]


def _rounded(value: float) -> float | None:
    return float(f"{value:.3g}") if np.isfinite(value) else None
