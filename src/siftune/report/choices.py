"""Section on the layers that trained and the rows that layers followed."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from siftune.base.errors import InputError
from siftune.report.charts import Plot, x_axis
from siftune.report.parts import Figure, Section, canvas, number, slug, tag
from siftune.report.subjects import RunData
from siftune.report.words import NBSP, cut, listed, percent
from siftune.train.folder.run_folder import SELECTIONS
from siftune.train.folder.selections import read_selections

_BINS = 112  # columns of the figure; a cell is then ten pixels wide at most
_SHADES = 4
_NAMED = 3
_MOST_SOURCES, _NAME = 6, 40  # sources that are named, and letters of a name
_MOST_LAYERS = 2**10  # an untrusted file could name any layer


def selection(run: RunData, several: bool) -> Section | None:
    """The layers that trained over the steps, and the shares of rows that they followed; None if a run selects none."""
    words, figures = [], []
    steps, trained_LS = _trained(run)
    if trained_LS.size:
        words.append(_layer_text(run, trained_LS))
        figures.append(_layer_figure(steps, trained_LS))
    if run.followed:
        words.append(_row_text(run))
    if not words:
        return None
    title = f"Selected layers and rows{f': {run.name}' if several else ''}"
    return Section(f"selection-{slug(run.name)}", title, words, figures)


def _trained(run: RunData) -> tuple[list[int], NDArray[np.float64]]:
    """Steps with a choice of layers; and (L, S) 1 where a layer trained in a step.

    Raises:
        InputError: The record is damaged, or no run has made it.
    """
    path = run.path / SELECTIONS
    if not path.exists():
        return [], np.zeros((0, 0))
    table = read_selections(path)
    table = table.filter(table["batch"].is_null())  # without choices of rows
    steps, chosen, importance = (table[name].to_pylist() for name in ("step", "layers", "importance"))
    try:
        numbers = [layer for layers in chosen for layer in layers]
        depth = max([*map(len, importance), *(1 + layer for layer in numbers)], default=0)
        ascending = all(before < after for before, after in pairwise(map(int, steps)))
        if min(numbers, default=0) < 0 or depth > _MOST_LAYERS or not ascending:
            raise ValueError("steps or layers of no run")
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); move it elsewhere") from error
    trained_LS = np.zeros((depth, len(steps)))
    for place, layers in enumerate(chosen):
        trained_LS[layers, place] = 1
    return steps, trained_LS


def _layer_text(run: RunData, trained_LS: NDArray[np.float64]) -> str:
    shares = trained_LS.mean(1)
    order = np.argsort(-shares, kind="stable").tolist()
    per_step = trained_LS.sum(0)
    count = f"{per_step[0]:.0f}" if np.ptp(per_step) == 0 else f"{per_step.mean():.1f} on average"
    most = listed([f"{layer} ({100 * shares[layer]:.0f}{NBSP}%)" for layer in order[:_NAMED]])
    least = listed([f"{layer} ({100 * shares[layer]:.0f}{NBSP}%)" for layer in order[-_NAMED:]])
    return (
        f"Method {run.recipe.method}: of {len(shares)} layers {count} trained in a step. Most often the layers {most} "
        f"of the steps, least often {least}. Layer 0 is next to the embeddings."
    )


def _row_text(run: RunData) -> str:
    """Share of rows that were followed, of each source if there are a few."""
    since, shares = run.figure("resumed_step"), [*run.followed.values()]
    after = "" if since is None else f" after step {since:,.0f}"
    if len(shares) == 1:
        values = percent(shares[0])
    elif len(shares) > _MOST_SOURCES:
        values = f"{percent(min(shares))} to {percent(max(shares))} in {len(shares):,} sources"
    else:
        values = listed([f"“{cut(source, _NAME)}” {percent(share)}" for source, share in run.followed.items()])
    return f"Share of the rows that a layer followed{after}, on average: {values}."


def _layer_figure(steps: Sequence[int], trained_LS: NDArray[np.float64]) -> Figure:
    """Layers up, steps across; the shade is the share of a column's steps in which the layer trained."""
    size = -(-len(steps) // _BINS)
    parts = [range(start, min(start + size, len(steps))) for start in range(0, len(steps), size)]
    shares_LC = np.stack([trained_LS[:, part].mean(1) for part in parts], 1)
    edges = [*(steps[part[0]] for part in parts), steps[-1] + 1]
    note = f"A column is {size} steps: the stronger the colour, the more of them trained the layer." if size > 1 else ""
    title = "Trained layers by step"
    return Figure(title, lambda width: _draw_layers(width, title, edges, shares_LC), note, "full")


def _draw_layers(width: int, title: str, edges: Sequence[int], shares_LC: NDArray[np.float64]) -> Markup:
    depth = len(shares_LC)
    height = min(17.0, 340 / depth) * depth
    plot = Plot(44, 24, width - 54.0, height, (edges[0], edges[-1]), (-0.5, depth - 0.5))
    drawn = [tag("rect", x=plot.left, y=plot.top, width=plot.width, height=height, class_="empty")]
    shades_LC = np.ceil(shares_LC * _SHADES).astype(int)
    columns = [(plot.at_x(left), plot.at_x(right)) for left, right in pairwise(edges)]
    for shade in range(1, _SHADES + 1):
        cells = "".join(
            f"M{number(columns[column][0])} {number(plot.at_y(layer + 0.5))}H{number(columns[column][1])}"
            f"V{number(plot.at_y(layer - 0.5))}H{number(columns[column][0])}z"
            for layer, column in np.argwhere(shades_LC == shade).tolist()
        )
        if cells:
            drawn.append(tag("path", d=cells, class_="dot c0 cells", opacity=f"{shade / _SHADES:.2f}"))
    drawn.append(tag("text", "layer", x=0.0, y=10.0, class_="axis"))
    for layer in range(0, depth, max(1, round(depth / 12))):
        y = plot.at_y(layer) + 3.5
        drawn.append(tag("text", str(layer), x=plot.left - 6, y=y, class_="tick end"))
    return canvas(width, plot.top + height + 34, title, *drawn, *x_axis(plot, "optimizer step"))
