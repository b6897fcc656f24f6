"""What a call would take, on paper: parameters, steps, and estimates of time and memory; see `shape.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lab.reproduce.cells import Reproduction
from lab.reproduce.harness_rows import training_counts
from lab.reproduce.offsite import BASE, Offsite, outer_layers_of
from lab.reproduce.rows import training_count
from lab.reproduce.shape import GPUS, Shape, shape_of
from siftune.report.table import Table


@dataclass(frozen=True)
class Planned:
    """Runs that are alike.

    Attributes:
        label: What they are of.
        shape: What is known of one.
        rows: Rows that it trains on.
        seconds: Time of one; None where it was not measured.
        bytes: Memory of one; None where it was not measured.
        runs: How many there are, and how many steps of a sweep come on top, in runs.
    """

    label: str
    shape: Shape
    rows: int
    seconds: float | None
    bytes: float | None
    runs: float


def planned(work: Reproduction | Offsite, data: str, limit: int | None, gpu: str) -> list[Planned]:
    """All runs of a call, training alone.

    Args:
        work: The call.
        data: Where rows would come from.
        limit: How many are trained on at the most.
        gpu: One of GPUS.

    Raises:
        DataError: Rows are missing, or too few.
        InputError: An adapter does not fit the model.
    """
    return _offsite(work, data, limit, gpu) if isinstance(work, Offsite) else _cells(work, data, limit, gpu)


def _cells(work: Reproduction, data: str, limit: int | None, gpu: str) -> list[Planned]:
    protocol = work.protocol
    rows = training_count(protocol.suite, work.tasks, data, limit)
    made = []
    for group in work.groups:
        shape = shape_of(protocol.config, work.recipe(group), rows)
        runs = _runs(work, shape)
        for method in work.grid.methods:
            seconds, needed = shape.seconds(gpu, method), shape.bytes(method)
            made.append(Planned(work.label(group, method), shape, rows, seconds, needed, runs))
    return made


def _offsite(work: Offsite, data: str, limit: int | None, gpu: str) -> list[Planned]:
    suite, made = work.protocol.suite, []
    for task, rows in training_counts(suite, work.tasks, data, limit).items():
        whole = shape_of(work.protocol.config, outer_layers_of(work.protocol.recipe), rows)
        for name in (BASE, *work.emulators):
            shape, label = whole if name == BASE else whole.emulated(work.keep), f"{task} on {name}"
            made.append(Planned(label, shape, rows, shape.seconds(gpu), shape.bytes(), _runs(work, shape)))
    return made


def _runs(work: Reproduction | Offsite, shape: Shape) -> float:
    rates = len(work.grid.rates)
    share = min(work.sweep_steps or shape.steps, shape.steps) / shape.steps
    return len(work.grid.seeds) + (rates * share if rates > 1 else 0.0)


def plan_table(plan: Sequence[Planned], gpu: str) -> Table:
    """A line for each kind of run, and one for all of them."""
    lines = [
        [one.label, f"{one.shape.trainable:,}", f"{one.rows:,}", f"{one.shape.steps:,}",
         _shown(one.seconds, _hours), _shown(one.bytes, _gigabytes), f"{one.runs:g}"]
        for one in plan
    ]  # fmt: skip
    lines.append(["all", "", "", "", _shown(whole_time(plan), _hours), "", f"{sum(one.runs for one in plan):g}"])
    header = ["run", "parameters that train", "rows", "steps", "time", "memory", "runs"]
    return Table(header, lines, f"estimated on {gpu} of {GPUS[gpu][1] / 1e9:.0f} GB, sweeps among the runs")


def whole_time(plan: Sequence[Planned]) -> float | None:
    """Seconds of all runs; None where one of them is not known."""
    times = [one.seconds for one in plan]
    if None in times:
        return None
    return sum(one.runs * seconds for one, seconds in zip(plan, times, strict=True) if seconds is not None)


def plan_record(plan: Sequence[Planned]) -> dict[str, Any]:
    """The same in plain types."""
    runs = {
        one.label: {
            "parameters": one.shape.parameters, "trainable": one.shape.trainable, "steps": one.shape.steps,
            "rows": one.rows, "seconds": one.seconds, "bytes": one.bytes, "runs": one.runs,
        }
        for one in plan
    }  # fmt: skip
    return {"runs": runs, "seconds": whole_time(plan)}


def _shown(value: float | None, write: Callable[[float], str]) -> str:
    return "not measured" if value is None else write(value)


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.0f} GB"
