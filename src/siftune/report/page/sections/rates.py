"""Learning rates that `siftune sweep-lr` tried: held-out loss over rate, by method."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from siftune.base.errors import InputError
from siftune.base.jsonable import finite
from siftune.base.words import counted
from siftune.methods import METHODS
from siftune.report.lr import advice, before, bests, cells_of, table, top_of
from siftune.report.page.axes import BOLD, Plot, room, spread, x_axis, y_axis
from siftune.report.page.figure import Figure, canvas, slug
from siftune.report.page.lines import COLOURS
from siftune.report.page.section import Section, grid_of
from siftune.report.page.subjects import STRANGE, Other
from siftune.report.page.svg import path, tag
from siftune.report.page.words import listed, short
from siftune.train.rates.grid import LRRun, rate_text

_NAMED = 6  # rates that are named below the picture, at the most
_MEANING = (
    "Held-out loss when training has ended, in nats per label token; ± is the standard deviation over seeds, * the "
    "best rate of a method. Differences that are small beside those between seeds say nothing."
)
_TITLE = "Held-out loss by learning rate"
_NOTE = "Lines go through the means over seeds; ×: a run diverged; ▲: a loss above the picture."


def in_a_sentence(record: Mapping[str, Any]) -> str:
    """The best rate of each method."""
    try:
        runs, base = _read(record)
    except STRANGE:
        return "A sweep of learning rates."
    if not runs:
        return "A sweep of learning rates has begun; no run is done yet."
    found = sorted((one for one in bests(runs) if one.heldout_loss is not None), key=lambda one: one.heldout_loss or 0)
    if not found:
        return f"{counted(len(runs), 'run')}, and at every rate some diverged."
    named = [f"{short(one.heldout_loss, 4)} with {one.method} at {rate_text(one.lr)}" for one in found if one.lr]
    return (
        f"The least held-out loss of {counted(len(runs), 'run')}, by method: {listed(named)}; before training it is "
        f"{short(base, 4)}."
    )


def rates(other: Other) -> Section:
    """The table, what to take from it, and the picture."""
    try:
        runs, base = _read(other.content)
    except STRANGE as error:
        raise InputError(
            f"{other.path} is no sweep of learning rates ({error!r}): run siftune sweep-lr again"
        ) from error
    title, name = f"Learning rates in {other.name}", slug(other.name)
    if not runs:
        return Section(f"rates-{name}", title, [before(base)])
    figure = Figure(f"rates-{name}", _TITLE, lambda width: _draw(width, runs, base), _NOTE, "half")
    return Section(
        f"rates-{name}", title, [before(base), *advice(runs, base), _MEANING], [figure], [grid_of(table(runs))]
    )


def _read(record: Mapping[str, Any]) -> tuple[list[LRRun], float]:
    """Runs and the base's loss, from files that may be a stranger's; of two runs in one cell the later."""
    runs = [_run(one) for one in record["runs"]]
    return list({run.cell: run for run in runs}.values()), finite(record["heldout_loss"])


def _run(record: Mapping[str, Any]) -> LRRun:
    if record["method"] not in METHODS:
        raise ValueError(f"{record['method']} is no method")
    losses = {name: None if record[name] is None else finite(record[name]) for name in ("heldout_loss", "train_loss")}
    if not finite(record["lr"]) > 0:
        raise ValueError(f"{record['lr']} is no rate")
    return LRRun(
        method=record["method"], lr=finite(record["lr"]), seed=int(record["seed"]), **losses,
        steps=int(record["steps"]), seconds=finite(record["seconds"]), diverged=record.get("diverged"),
    )  # fmt: skip


def _draw(width: int, runs: Sequence[LRRun], base: float) -> Markup:
    """Loss over the logarithm of the rate, a line for each method and a point for each run."""
    cells = cells_of(runs)
    losses = [run.heldout_loss for run in runs if run.heldout_loss is not None] or [base]
    top, tried = top_of(losses, base), sorted({run.lr for run in runs})
    right = 20 + BOLD * max(map(len, cells))
    ends = math.log(tried[0]) - 0.2, math.log(tried[-1]) + 0.2
    plot = Plot(44, 20, width - 44 - right, 200, ends, room([*(min(one, top) for one in losses), top]))
    parts = [*y_axis(plot, "nats per token"), *_rates_below(plot, tried)]
    lasts = []
    for number, (method, row) in enumerate(cells.items()):
        kind = f"c{number % COLOURS}"
        means = [(rate, min(cell.mean, top)) for rate, cell in row.items() if cell.losses]
        places = [(plot.at_x(math.log(rate)), plot.at_y(mean)) for rate, mean in means]
        parts += [tag("path", d=path(places), class_=f"line {kind}")] if len(places) > 1 else []
        parts += [_mark(plot, run, top, kind) for run in runs if run.method == method]
        lasts.append(places[-1][1] if places else plot.top)
    heights = spread(lasts, 13, plot.top, plot.top + plot.height)
    for number, (method, height) in enumerate(zip(cells, heights, strict=True)):
        x = plot.left + plot.width + 7
        parts.append(tag("text", method, x=x, y=height + 4, class_=f"name c{number % COLOURS}"))
    return canvas(width, plot.top + plot.height + 34, _TITLE, *parts)


def _rates_below(plot: Plot, tried: Sequence[float]) -> list[Markup]:
    """The rates that were tried, and no others."""
    named = tried[:: math.ceil(len(tried) / _NAMED)]
    return x_axis(plot, "peak learning rate", {math.log(rate): rate_text(rate) for rate in named})


def _mark(plot: Plot, run: LRRun, top: float, kind: str) -> Markup:
    """A point where a run stands; what has no place in the picture is marked at its top edge."""
    x = plot.at_x(math.log(run.lr))
    if run.heldout_loss is not None and run.heldout_loss <= top:
        return tag("circle", cx=x, cy=plot.at_y(run.heldout_loss), r=3.0, class_=f"dot {kind}")
    sign = "×" if run.heldout_loss is None else "▲"
    return tag("text", sign, x=x, y=plot.at_y(top) + 4, class_=f"name middle {kind}")
