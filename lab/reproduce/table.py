"""The papers' table and our results, with intervals.

A figure is the mean over a task's questions and over seeds. Its interval draws questions: the same ones for all seeds
and for all that are compared, so it covers the choice of questions; the ± behind it is the deviation over seeds. The
average gives all tasks the same weight, as in the papers; its interval, and that of the difference to a reference,
draws the questions of each task separately. Nats are per token of the right answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from lab.reproduce.answers import Answers, Scores
from siftune.evaluate.bootstrap import Bootstrap, Estimate, Means, resample
from siftune.report.table import Table

AVERAGE, DIFFERENCE = "average", "difference"
_WORDS = {
    "generated": "% correct in generated answers",
    "likeliest": "% correct by log-likelihood",
    "nats": "nats per token of the correct answers, lower is better",
}


@dataclass(frozen=True)
class Line:
    """A line of one's own in the tables.

    Attributes:
        label: What it is of.
        seeds: For each seed, task -> the file of its answers, which may not be there yet.
        reference: Label of the line whose average is taken off; None for none.
    """

    label: str
    seeds: Sequence[Mapping[str, Answers]]
    reference: str | None = None


def results(lines: Sequence[Line], tasks: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """Everything that has been found so far, in plain types.

    Args:
        lines: What is compared.
        tasks: The tasks, in their order.
        metrics: Which metrics.

    Returns:
        metric -> label -> task, "average" or "difference" -> figure and interval; lines without any are left out.
    """
    found = {}
    for metric in metrics:
        by_task = {task: _known(lines, task, metric) for task in tasks}
        means = {task: _means(known, number) for number, (task, known) in enumerate(by_task.items()) if known}
        rows = {line.label: _figures(line, by_task, means) for line in lines}
        if any(rows.values()):
            found[metric] = {label: figures for label, figures in rows.items() if figures}
    return found


def _known(lines: Sequence[Line], task: str, metric: str) -> dict[str, list[Scores]]:
    """What each line has of a task, seed by seed; lines that have nothing are left out."""
    asked = {line.label: [seed[task].scores(metric) for seed in line.seeds if task in seed] for line in lines}
    known = {label: [one for one in scores if one is not None] for label, scores in asked.items()}
    return {label: scores for label, scores in known.items() if scores}


def _means(known: Mapping[str, Sequence[Scores]], number: int) -> Means:
    """A task's means over questions and seeds; each task draws its questions by a seed of its own."""
    values = {label: np.mean([one.values for one in scores], axis=0) for label, scores in known.items()}
    weights = next(iter(known.values()))[0].weights
    return resample(values, weights, Bootstrap(seed=number))


def _figures(
    line: Line, by_task: Mapping[str, Mapping[str, Sequence[Scores]]], means: Mapping[str, Means]
) -> dict[str, Any]:
    """A line's figure of each task, and with all tasks their average."""
    label = line.label
    figures: dict[str, Any] = {}
    for task, known in by_task.items():
        if label in known:
            seeds = [sum(one.values) / sum(one.weights) for one in known[label]]
            deviation = stdev(seeds) if len(seeds) > 1 else None
            about = {"seeds": len(seeds), "questions": len(known[label][0].values), "deviation": deviation}
            figures[task] = asdict(means[task].mean(label)) | about
    if figures and figures.keys() == by_task.keys():
        figures[AVERAGE] = asdict(_average(label, means).mean(label))
        other = line.reference
        if other is not None and all(other in known for known in by_task.values()):
            figures[DIFFERENCE] = asdict(_difference(label, other, means))
    return figures


def _average(label: str, means: Mapping[str, Means]) -> Means:
    """A line's mean over tasks, on the questions and on all draws of them."""
    every = list(means.values())
    draws = np.mean([one.draws[label] for one in every], axis=0)
    return Means({label: fmean(one.point[label] for one in every)}, {label: draws}, every[0].bootstrap)


def _difference(label: str, other: str, means: Mapping[str, Means]) -> Estimate:
    first, second = _average(label, means), _average(other, means)
    both = Means({**first.point, **second.point}, {**first.draws, **second.draws}, first.bootstrap)
    return both.difference(label, other)


def tables(name: str, found: Mapping[str, Any], titles: Mapping[str, str], reference: str | None) -> list[Table]:
    """A table for each metric.

    Args:
        name: Of the suite and model.
        found: From `results`.
        titles: Task -> its title.
        reference: Name of what differences are to; None where there are none.
    """
    header = ["", *titles.values(), AVERAGE, *([f"− {reference}"] if reference else [])]
    return [
        Table(
            header,
            [_own(label, figures, [*titles], metric)[: len(header)] for label, figures in lines.items()],
            title=f"{name}, {_WORDS[metric]}",
        )
        for metric, lines in found.items()
    ]


def _own(label: str, figures: Mapping[str, Any], tasks: Sequence[str], metric: str) -> list[str]:
    return [f"{label}, here", *(_cell(figures.get(name), metric) for name in [*tasks, AVERAGE, DIFFERENCE])]


def _cell(figure: Mapping[str, Any] | None, metric: str) -> str:
    if figure is None:
        return ""
    factor, digits = (1, 3) if metric == "nats" else (100, 1)
    value, low, high = (f"{factor * figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    deviation = figure.get("deviation")
    text = f"{value} ({low} to {high})"
    return text if deviation is None else f"{text} ±{factor * deviation:.{digits}f}"
