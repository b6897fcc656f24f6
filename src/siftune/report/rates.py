"""A sweep of learning rates: the table, the best rate of each method, rates to try next, and a section of a page."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from markupsafe import Markup

from siftune.base.errors import InputError
from siftune.base.text import counted, finite, jsonable
from siftune.methods import METHODS
from siftune.report.charts import BOLD, COLOURS, Plot, room, spread, x_axis, y_axis
from siftune.report.parts import Figure, Section, canvas, grid_of, path, slug, tag
from siftune.report.subjects import UNREADABLE, Sweep
from siftune.report.table import Table, markdown_table
from siftune.report.words import listed, short
from siftune.train.rates.grid import LRRun, rate_text
from siftune.train.rates.sweep import LRFolder

_MEANING = (
    "Loss on held-out rows at the end of training, in nats per label token; ± is the standard deviation over seeds. *: "
    "the best rate of a method, among those at which no run diverged. A number in brackets is the number of seeds, if "
    "it is not the same for all rates. Differences that are small compared to those between seeds mean nothing. The "
    "best rate depends on the number of steps."
)
_MOST_NAMED = 6  # rates named below the figure


@dataclass(frozen=True)
class Cell:
    """The runs of a method at a rate."""

    losses: tuple[float, ...]  # held-out losses of the seeds that did not diverge
    diverged: int  # number of seeds that diverged

    @property
    def mean(self) -> float:
        """Mean over the seeds that did not diverge; at least one."""
        return fmean(self.losses)


@dataclass(frozen=True)
class Best:
    """The best rate of a method."""

    method: str
    lr: float | None  # None if runs diverged at every rate
    heldout_loss: float | None  # its mean loss
    edge: (
        str | None
    )  # "lowest" or "highest" if the best rate is at that end of the grid, so that a better may be beyond
    extend: tuple[float, ...]  # rates to try next: beyond an edge, or if there is no best or only one rate

    @property
    def flags(self) -> str | None:
        """Options of `siftune train`."""
        return None if self.lr is None else f"--method {self.method} --lr {rate_text(self.lr)}"


def write_report(folder: LRFolder) -> dict[str, Any]:
    """Write results.json and results.md of all runs in a folder; return the content of results.json."""
    runs, base = folder.runs(), folder.base_loss
    result = to_dict(runs, base)
    lines = "\n".join(f"- {line}" for line in advice(runs, base))
    page = f"# Learning rates\n\n{markdown_table(table(runs))}\n\n{before(base)}\n\n{lines}\n\n{_MEANING}\n"
    record = json.dumps(result, indent=2, allow_nan=False) + "\n"
    folder.write("results.json", record)
    folder.write("results.md", page)
    return result


def to_dict(runs: Sequence[LRRun], base: float) -> dict[str, Any]:
    """Runs and best rates in plain types."""
    best = {one.method: {**jsonable(one), "flags": one.flags} for one in bests(runs)}
    return {"base_heldout_loss": base, "best": best, "runs": [asdict(run) for run in runs]}


def cells_of(runs: Sequence[LRRun]) -> dict[str, dict[float, Cell]]:
    """Losses by method and rate: methods in the order of METHODS, rates ascending."""
    groups: dict[tuple[str, float], list[LRRun]] = {}
    for run in runs:
        groups.setdefault((run.method, run.lr), []).append(run)
    cells: dict[str, dict[float, Cell]] = {}
    for method, rate in sorted(groups, key=lambda key: ([*METHODS].index(key[0]), key[1])):
        losses = tuple(run.heldout_loss for run in groups[method, rate] if run.heldout_loss is not None)
        cells.setdefault(method, {})[rate] = Cell(losses, len(groups[method, rate]) - len(losses))
    return cells


def bests(runs: Sequence[LRRun]) -> list[Best]:
    """The best rate of each method: the lowest mean loss of those at which no run diverged."""
    return [_best(method, row) for method, row in cells_of(runs).items()]


def _best(method: str, row: Mapping[float, Cell]) -> Best:
    rates = [*row]  # ascending
    sound = [rate for rate in rates if not row[rate].diverged]
    if not sound:
        return Best(method, None, None, None, _beyond(rates, "lowest"))
    rate = min(sound, key=lambda rate: row[rate].mean)
    if len(rates) == 1:
        return Best(method, rate, row[rate].mean, None, (rate / 2, rate * 2))
    edge = "lowest" if rate == rates[0] else "highest" if rate == rates[-1] else None
    return Best(method, rate, row[rate].mean, edge, _beyond(rates, edge) if edge else ())


def _beyond(rates: Sequence[float], edge: str) -> tuple[float, ...]:
    """Two rates beyond an end of the grid, ascending, in the steps of the grid, by at most a factor of two each."""
    last, inner = (rates[0], rates[:2][-1]) if edge == "lowest" else (rates[-1], rates[-2:][0])
    step = min(max(last / inner, inner / last), 2.0) if last != inner else 2.0
    factor = step if edge == "highest" else 1 / step
    return tuple(sorted(float(f"{last * factor**power:.3g}") for power in (1, 2)))


def table(runs: Sequence[LRRun]) -> Table:
    """Methods down, rates across; the best rate of each method is marked."""
    cells = cells_of(runs)
    rates = sorted({rate for row in cells.values() for rate in row})
    counts = {len(cell.losses) + cell.diverged for row in cells.values() for cell in row.values()}
    best = {one.method: one.lr for one in bests(runs)}
    rows = [
        [method, *(_cell(row.get(rate), rate == best[method], len(counts) > 1) for rate in rates)]
        for method, row in cells.items()
    ]
    return Table(["method", *map(rate_text, rates)], rows, title="held-out loss by learning rate, nats per token")


def _cell(cell: Cell | None, best: bool, counted: bool) -> str:
    if cell is None:
        return ""
    if not cell.losses:
        return "diverged"
    parts = ["*"] if best else []
    parts.append(f"{cell.mean:.4f}")
    parts += [f"±{stdev(cell.losses):.4f}"] if len(cell.losses) > 1 else []
    parts += [f"({len(cell.losses)})"] if counted else []
    parts += [f"({cell.diverged} diverged)"] if cell.diverged else []
    return " ".join(parts)


def before(base: float) -> str:
    """The loss of the base model, as text."""
    return f"Before training the loss is {base:.4f}."


def advice(runs: Sequence[LRRun], base: float) -> list[str]:
    """For each method the options to copy, and rates to try next."""
    return [_advice(one, base) for one in bests(runs)]


def _advice(one: Best, base: float) -> str:
    rates = ",".join(map(rate_text, one.extend))
    if one.lr is None or one.heldout_loss is None:
        return f"{one.method}: at every rate a run diverged: extend --rates to {rates}"
    worse = "" if one.heldout_loss < base else ", no better than before training"
    line = f"{one.flags}   held-out loss {one.heldout_loss:.4f}{worse}"
    if one.edge:
        return f"{line}; the {one.edge} rate tried: extend --rates to {rates}"
    return f"{line}; the only rate tried: add --rates {rates}" if one.extend else line


def top_of(losses: Sequence[float], base: float) -> float:
    """The highest loss inside the figure: slightly above that of the base model, if any run is below it."""
    low, high = min(losses), max(losses)
    return min(high, base + 0.3 * (base - low)) if low < base else high


def sentence(record: Mapping[str, Any]) -> str:
    """The result of a sweep in a sentence."""
    try:
        runs, base = _read(record)
    except UNREADABLE:
        return "A sweep of learning rates."
    if not runs:
        return "A sweep of learning rates; no run is finished yet."
    finite = (one for one in bests(runs) if one.heldout_loss is not None)
    ranking = sorted(finite, key=lambda one: one.heldout_loss or 0)
    if not ranking:
        return f"{counted(len(runs), 'run')}: some diverged at every rate."
    named = [f"{short(one.heldout_loss, 4)} with {one.method} at {rate_text(one.lr)}" for one in ranking if one.lr]
    return (
        f"Lowest held-out loss of {counted(len(runs), 'run')}, by method: {listed(named)}; before training: "
        f"{short(base, 4)}."
    )


def section(sweep: Sweep) -> Section:
    """The figure, the table and the best rates."""
    try:
        runs, base = _read(sweep.record)
    except UNREADABLE as error:
        raise InputError(
            f"{sweep.path} is no sweep of learning rates ({error!r}): run siftune find-lr again"
        ) from error
    title, name = f"Learning rates in {sweep.name}", slug(sweep.name)
    if not runs:
        return Section(f"rates-{name}", title, [] if math.isnan(base) else [before(base)])
    note = "Lines connect the means over seeds. ×: a run diverged. ▲: a loss above the figure."
    label = "Held-out loss by learning rate"
    figure = Figure(label, lambda width: _draw(width, label, runs, base), note, "half")
    return Section(
        f"rates-{name}", title, [before(base), *advice(runs, base), _MEANING], [figure], [grid_of(table(runs))]
    )


def _read(record: Mapping[str, Any]) -> tuple[list[LRRun], float]:
    """Runs and the loss of the base from untrusted files; of two runs in one cell the later.

    Before the first run the loss may be missing; it is NaN then.
    """
    runs, state = [_parsed(one) for one in record["runs"]], record["state"]
    base = finite(state["heldout_loss"]) if runs or state else math.nan
    return list({run.cell: run for run in runs}.values()), base


def _parsed(record: Mapping[str, Any]) -> LRRun:
    if record["method"] not in METHODS:
        raise ValueError(f"{record['method']} is no method")
    losses = {name: None if record[name] is None else finite(record[name]) for name in ("heldout_loss", "train_loss")}
    if not finite(record["lr"]) > 0:
        raise ValueError(f"{record['lr']} is no rate")
    return LRRun(
        method=record["method"], lr=finite(record["lr"]), seed=int(record["seed"]), **losses,
        steps=int(record["steps"]), seconds=finite(record["seconds"]), diverged=record.get("diverged"),
    )  # fmt: skip


def _draw(width: int, title: str, runs: Sequence[LRRun], base: float) -> Markup:
    """Loss against the logarithm of the rate: a line for each method, a point for each run."""
    cells = cells_of(runs)
    losses = [run.heldout_loss for run in runs if run.heldout_loss is not None] or [base]
    top, tried = top_of(losses, base), sorted({run.lr for run in runs})
    right = 20 + BOLD * max(map(len, cells))
    ends = math.log(tried[0]) - 0.2, math.log(tried[-1]) + 0.2
    plot = Plot(44, 20, width - 44 - right, 200, ends, room([*(min(one, top) for one in losses), top]))
    named = tried[:: math.ceil(len(tried) / _MOST_NAMED)]
    parts = y_axis(plot, "nats per token")
    parts += x_axis(plot, "peak learning rate", {math.log(rate): rate_text(rate) for rate in named})
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
    return canvas(width, plot.top + plot.height + 34, title, *parts)


def _mark(plot: Plot, run: LRRun, top: float, kind: str) -> Markup:
    """The point of a run; a run above the figure, or one that diverged, is marked at the top edge."""
    x = plot.at_x(math.log(run.lr))
    if run.heldout_loss is not None and run.heldout_loss <= top:
        return tag("circle", cx=x, cy=plot.at_y(run.heldout_loss), r=3.0, class_=f"dot {kind}")
    sign = "×" if run.heldout_loss is None else "▲"
    return tag("text", sign, x=x, y=plot.at_y(top) + 4, class_=f"name middle {kind}")
