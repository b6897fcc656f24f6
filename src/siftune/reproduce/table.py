"""The papers' table beside one's own, with intervals.

A figure is the mean over a task's questions and over seeds. Its interval draws questions: the same ones for all seeds,
so that it tells how far the figure hangs on which questions are asked; what seeds do besides is the ± behind it. The
average is over tasks alike, as in the papers, and has no interval of its own kind there.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from siftune.evaluate.bootstrap import Estimate, resample
from siftune.report.table import Table
from siftune.reproduce.cells import Cell, Reproduction
from siftune.reproduce.protocol import Printed
from siftune.reproduce.tasks import TASKS

METRICS = ("generated", "likeliest")


def results(work: Reproduction) -> dict[str, Any]:
    """Everything that has been found so far, in plain types: metric -> method -> task -> figure and interval."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        for method in work.grid.methods:
            cells = [cell for cell in work.cells() if cell.method == method]
            tasks = {task: _figure(cells, task, metric) for task in work.tasks}
            known = {task: figure for task, figure in tasks.items() if figure is not None}
            if known:
                found.setdefault(metric, {})[method] = known
    return found


def _figure(cells: Sequence[Cell], task: str, metric: str) -> dict[str, Any] | None:
    """A task's figure over the seeds that have been asked; None where none has."""
    asked = [right[metric] for cell in cells if (right := cell.right(task)) is not None and metric in right]
    if not asked:
        return None
    by_question = np.mean(np.array(asked, dtype=np.float64), axis=0)
    estimate: Estimate = resample({"right": by_question}).mean("right")
    seeds = [fmean(one) for one in asked]
    return {
        "right": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "seeds": len(asked),
        "questions": len(by_question),
        "deviation": stdev(seeds) if len(seeds) > 1 else None,
    }


def tables(work: Reproduction, found: Mapping[str, Any]) -> list[Table]:
    """A table for each metric; that of generated answers has the papers' rows on top."""
    made = []
    for metric, methods in found.items():
        rows = [_printed(row, work.tasks) for row in work.protocol.printed] if metric == "generated" else []
        rows += [_own(method, figures, work) for method, figures in methods.items()]
        header = ["", *(TASKS[task].title for task in work.tasks), "average"]
        words = "in the text that it writes" if metric == "generated" else "by log-likelihood of the options"
        made.append(Table(header, rows, title=f"{work.protocol.name}, % right {words}"))
    return made


def _printed(row: Printed, tasks: Sequence[str]) -> list[str]:
    figures = [row.right[task] for task in tasks]
    return [f"{row.who} ({row.source})", *(f"{value:.1f}" for value in figures), f"{fmean(figures):.1f}"]


def _own(method: str, figures: Mapping[str, Any], work: Reproduction) -> list[str]:
    values = [figures[task]["right"] for task in work.tasks if task in figures]
    average = f"{100 * fmean(values):.1f}" if len(values) == len(work.tasks) else ""
    return [f"{method}, here", *(_cell(figures.get(task)) for task in work.tasks), average]


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    low, high = 100 * figure["low"], 100 * figure["high"]
    text = f"{100 * figure['right']:.1f} ({low:.1f} to {high:.1f})"
    return text if figure["deviation"] is None else f"{text} ±{100 * figure['deviation']:.1f}"
