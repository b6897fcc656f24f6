"""What training steps cost with each method, as `siftune bench` measured it."""

from collections.abc import Mapping
from typing import Any

from siftune.base.errors import InputError
from siftune.base.jsonable import finite
from siftune.base.words import counted
from siftune.report.bench import cost_table, notes
from siftune.report.page.figure import Figure, slug
from siftune.report.page.points import Point, Scale, listed_points
from siftune.report.page.section import Section, grid_of
from siftune.report.page.subjects import STRANGE, Other
from siftune.report.page.words import short


def in_a_sentence(record: Mapping[str, Any]) -> str:
    """The range of what a step takes."""
    try:
        costs = {str(method): finite(cost["seconds_per_step"]) for method, cost in record["methods"].items()}
        low, high = min(costs, key=costs.__getitem__), max(costs, key=costs.__getitem__)
    except STRANGE:
        return "Time and memory of training steps."
    return (
        f"{counted(len(costs), 'method')} measured: a step takes from {short(costs[low])} s with {low} to "
        f"{short(costs[high])} s with {high}."
    )


def bench(other: Other) -> Section:
    """Time and memory of every method."""
    record, name = other.content, slug(other.name)
    try:
        figures = [
            _figure(f"step-{name}", "Time of a step", record, ("seconds_per_step", "fastest", "slowest"), "seconds"),
            _figure(f"memory-{name}", "Peak memory", record, ("peak_memory_mb",), "10⁶ bytes"),
        ]
        table, words = grid_of(cost_table(record)), notes(record)
    except STRANGE as error:
        raise InputError(f"{other.path} is not what siftune bench --out writes ({error!r}): measure again") from error
    return Section(f"bench-{name}", f"Costs in {other.name}", words, figures, [table])


def _figure(name: str, title: str, record: Mapping[str, Any], keys: tuple[str, ...], unit: str) -> Figure:
    """A line for each method: its median, and its fastest and slowest round where they are known."""
    points = []
    for number, (method, cost) in enumerate(record["methods"].items()):
        value, *ends = (finite(cost[key]) for key in keys)
        low, high = ends or (None, None)
        points.append(Point(str(method), value, low, high, colour=number))
    note = "Bars go from the fastest round to the slowest." if len(keys) > 1 else ""
    return listed_points(name, title, points, Scale(unit), note)
