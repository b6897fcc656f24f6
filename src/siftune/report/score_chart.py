"""Chart of a sifted pool: the similarity of each row's prompt across, its score up, and both limits."""

from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup

from siftune.report.charts import COLOURS, Plot, room, x_axis, y_axis
from siftune.report.parts import Figure, canvas, number, path, tag
from siftune.report.words import short
from siftune.sifting.choose import Limits

_MOST = 1000  # rows of a group that are drawn (ours)
_BEYOND = 0.005  # share of the scores that may be above the axis, and are drawn at its end (ours)
_STRIP = 26  # pixels for rows without a score, above the others
_CROSS = 2.2  # pixels from the middle of a cross to its ends


Point = tuple[float, float | None]  # similarity and score of a row; None for a row without a score


def score_chart(selected: Sequence[Point], others: Sequence[Point], limits: Limits) -> Figure:
    """Draw selected rows as dots, and the others as crosses.

    Args:
        selected: The selected rows; with the others at least one.
        others: The other rows.
        limits: The limits by which they were selected; there is no line for None.
    """
    title = "Similarity of prompts and scores"
    note = "Dots: selected. Crosses: left out. The higher, the less the answer fits."
    if any(score is None for _, score in (*selected, *others)):
        note += " Rows without a score, such as those of other tasks, are at the top."
    if max(len(selected), len(others)) > _MOST:
        note += f" At most {_MOST:,} rows of each kind are drawn."
    return Figure(title, lambda width: _draw(width, title, selected, others, limits), note, "full")


def _draw(width: int, title: str, selected: Sequence[Point], others: Sequence[Point], limits: Limits) -> Markup:
    every = [*selected, *others]
    scores = [score for _, score in every if score is not None]
    across = room([*(x for x, _ in every), *([] if limits.similarity is None else [limits.similarity])])
    highest = [float(np.quantile(scores, 1 - _BEYOND))] if scores else [1.0]
    highest += [] if limits.score is None else [limits.score]
    up = room([min([*scores, *highest]), *highest])
    strip = _STRIP if len(scores) < len(every) else 0
    plot = Plot(54, 38.0 + strip, width - 64.0, 250, across, up)
    right, bottom, top = plot.left + plot.width, plot.top + plot.height, plot.top - strip
    drawn = [*y_axis(plot, "score: the lower, the better the answer fits"), *x_axis(plot, "similarity of the prompt")]
    if strip:
        drawn.append(tag("text", "no score", x=plot.left - 6, y=plot.top - strip / 2 + 3.5, class_="tick end"))
    drawn.append(tag("path", d=_paths(plot, others, strip, _cross), class_="crosses c1"))
    drawn.append(tag("path", d=_paths(plot, selected, strip, _dot), class_="dots c0"))
    drawn.append(tag("text", f"● selected: {len(selected):,}", x=plot.left, y=27.0, class_="name c0"))
    drawn.append(tag("text", f"✕ left out: {len(others):,}", x=right, y=27.0, class_="name c1 end"))
    if limits.similarity is not None:
        x = plot.at_x(limits.similarity)
        drawn.append(tag("path", d=path([(x, top), (x, bottom)]), class_=f"line c{COLOURS - 1} dashed"))
        middle = x > plot.left + plot.width / 2
        place, side = (x - 5, " end") if middle else (x + 5, "")
        drawn.append(
            tag("text", f"limit {short(limits.similarity)}", x=place, y=bottom - 6, class_=f"label outlined{side}")
        )
    if limits.score is not None:
        y = plot.at_y(limits.score)
        drawn.append(tag("path", d=path([(plot.left, y), (right, y)]), class_=f"line c{COLOURS - 1} dashed"))
        drawn.append(tag("text", f"limit {short(limits.score)}", x=plot.left + 4, y=y - 5, class_="label outlined"))
    return canvas(width, bottom + 34, title, *drawn)


def _paths(plot: Plot, rows: Sequence[Point], strip: int, draw: Callable[[float, float], str]) -> str:
    """Marks of rows, evenly over all of them, as the attribute `d` of a path.

    Those without a score are spread over the strip, so that they do not hide each other.
    """
    parts, count = [], len(rows)
    for at in np.linspace(0, count - 1, min(count, _MOST)).round().astype(int).tolist():
        similarity, score = rows[at]
        in_strip = plot.top - 4 - (strip - 8) * (at * 0.618 % 1)
        height = in_strip if score is None else plot.at_y(min(score, plot.y[1]))
        parts.append(draw(plot.at_x(similarity), height))
    return "".join(parts)


def _dot(x: float, y: float) -> str:
    return f"M{number(x)} {number(y)}h0"


def _cross(x: float, y: float) -> str:
    low, high = number(y - _CROSS), number(y + _CROSS)
    left, right = number(x - _CROSS), number(x + _CROSS)
    return f"M{left} {low}L{right} {high}M{left} {high}L{right} {low}"
