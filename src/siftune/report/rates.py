"""A sweep of learning rates: the table, the best rate of each method, and rates to try next."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from siftune.base.text import jsonable
from siftune.methods import METHODS
from siftune.report.table import Table, markdown_table
from siftune.train.rates.grid import LRResult, LRRun, rate_text

_MEANING = (
    "Loss on held-out rows at the end of training, in nats per label token; ± is the standard deviation over seeds. *: "
    "the best rate of a method, among those at which no run diverged. A number in brackets is the number of seeds, if "
    "it is not the same for all rates. Differences that are small compared to those between seeds mean nothing. The "
    "best rate depends on the number of steps."
)


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
    edge: str | None  # "lowest" or "highest" if the best rate is at that end of the grid: a better may be beyond
    extend: tuple[float, ...]  # rates to try next: beyond an edge, or if there is no best or only one rate

    @property
    def flags(self) -> str | None:
        """Options of `siftune train`."""
        return None if self.lr is None else f"--method {self.method} --lr {rate_text(self.lr)}"


def to_markdown(result: LRResult) -> str:
    """The table, the best rates and their meaning as a page."""
    runs, base = result.runs, result.base_heldout_loss
    lines = "\n".join(f"- {line}" for line in advice(runs, base))
    return f"# Learning rates\n\n{markdown_table(table(runs))}\n\n{before(base)}\n\n{lines}\n\n{_MEANING}\n"


def to_dict(result: LRResult) -> dict[str, Any]:
    """Runs and best rates in plain types."""
    best = {one.method: {**jsonable(one), "flags": one.flags} for one in bests(result.runs)}
    return {"best": best, **asdict(result)}


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
