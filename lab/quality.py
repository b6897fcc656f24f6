"""Tables of recorded runs on support sets and selection rules, in Markdown."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from siftune.evaluate.bootstrap import paired_bootstrap
from siftune.report.table import Table, markdown_table

Line = dict[str, Any]
Runs = dict[int, Line]  # one method's finished runs, by seed

_APART = ("method", "seed", "overrides")  # what differs within a table
_BASES = ("dense", "random", "dense+support")  # what methods are compared with, where it was run
_NONE = "–"


def report(lines: Sequence[Line], metric: str | None = None, against: Sequence[str] = ()) -> str:
    """Write the tables of every task and setting, with methods in the order of their first run.

    Args:
        lines: Finished runs, as `quality.py` records them.
        metric: `exact_match`, `choices` or `choices_per_token`; None for the first that was measured.
        against: Methods that the others are compared with, besides the usual ones.
    """
    tables: dict[str, dict[str, Runs]] = {}
    for line in lines:
        job = line["job"]
        table = tables.setdefault(_heading(job), {})
        table.setdefault(job["method"], {})[job["seed"]] = line
    return "\n".join(_section(heading, methods, metric, (*_BASES, *against)) for heading, methods in tables.items())


def _heading(job: Line) -> str:
    values = {key: value for key, value in job.items() if key not in (*_APART, "task", "settings")}
    return f"{job['task']}: " + ", ".join(f"{key} {value}" for key, value in {**values, **job["settings"]}.items())


def _section(heading: str, methods: dict[str, Runs], metric: str | None, bases: Sequence[str]) -> str:
    some = next(iter(next(iter(methods.values())).values()))
    metric = metric or next(iter(some["correct"]))
    if metric not in some["correct"]:
        return f"## {heading}\n\n{metric} was not measured.\n"
    seeds = sorted({seed for runs in methods.values() for seed in runs})
    parts = [
        f"## {heading}",
        f"Correct answers in per cent by {metric}, {len(some['correct'][metric])} questions for each of the seeds "
        f"{', '.join(map(str, seeds))}; NLL of a right answer in nats. In brackets: 95 % of the paired bootstrap.",
        _quality(methods, metric, seeds, [base for base in bases if base in methods]),
    ]
    if any("wrong_in_draws" in line for runs in methods.values() for line in runs.values()):
        parts += [
            "Share of rows with a wrong label in the draws, in per cent, and mean z-scores of rows:",
            _labels(methods),
        ]
    return "\n\n".join(parts) + "\n"


def _quality(methods: dict[str, Runs], metric: str, seeds: Sequence[int], bases: Sequence[str]) -> str:
    def right(line: Line) -> list[float]:
        return [100 * value for value in line["correct"][metric]]

    def nll(line: Line) -> list[float]:
        return list(line["nll"])

    rows = []
    for name, runs in methods.items():
        each = [f"{np.mean(right(runs[seed])):.1f}" if seed in runs else _NONE for seed in seeds]
        rows.append([
            name, _mean(runs, right, ".1f"), " ".join(each),
            *(_against(methods, name, base, right, "+.1f") for base in bases),
            _mean(runs, nll, ".3f"), *(_against(methods, name, base, nll, "+.3f") for base in bases),
            *(_seconds(runs, key) for key in ("seconds_per_step", "processor_seconds_per_step")),
        ])  # fmt: skip
    titles = ["method", "correct", "each seed", *(f"− {base}" for base in bases)]
    titles += ["NLL", *(f"NLL − {base}" for base in bases), "s/step", "CPU s/step"]
    return markdown_table(Table(titles, rows))


def _mean(runs: Runs, values: Callable[[Line], list[float]], form: str) -> str:
    return f"{np.mean([np.mean(values(line)) for line in runs.values()]):{form}}"


def _seconds(runs: Runs, key: str) -> str:
    seconds = [line[key] for line in runs.values() if key in line]
    return f"{np.mean(seconds):.2f}" if seconds else _NONE


def _against(methods: dict[str, Runs], name: str, base: str, values: Callable[[Line], list[float]], form: str) -> str:
    """The difference to another method on the questions of the seeds that both have."""
    runs, others = methods[name], methods.get(base, {})
    shared = [seed for seed in runs if seed in others]
    if name == base or not shared:
        return _NONE
    before, after = ([value for seed in shared for value in values(side[seed])] for side in (others, runs))
    change = paired_bootstrap(before, after)
    text = f"{change.value:{form}} [{change.low:{form}}, {change.high:{form}}]"
    return text if len(shared) == len(runs) else f"{text} ({len(shared)} of {len(runs)} seeds)"


def _labels(methods: dict[str, Runs]) -> str:
    rows = []
    for name, runs in methods.items():
        lines = [line for line in runs.values() if "wrong_in_draws" in line]
        if lines:
            shares = [
                np.mean([line[key] for line in lines], axis=0) * 100
                for key in ("wrong_in_batches", "wrong_in_draws", "wrong_by_layers", "wrong_by_time")
            ]
            scores = [_scores(lines, key) for key in ("z_wrong", "z_right")]
            cells = (" ".join(f"{s:.1f}" for s in np.atleast_1d(share)) for share in shares)
            rows.append([name, *cells, *scores, _kinds(lines)])
    titles = ["method", "in the batches", "in the draws", "lower, middle, upper layers", "first, middle, last steps"]
    titles += ["z of wrong rows: lower, middle, upper layers", "z of right rows", "drawn of each kind"]
    return markdown_table(Table(titles, rows))


def _kinds(lines: Sequence[Line]) -> str:
    """Which share of the rows of each kind was drawn, over the seeds."""
    shares = [line["drawn_by_kind"] for line in lines if "drawn_by_kind" in line]
    kinds = shares[0] if shares else {}
    return ", ".join(f"{kind} {100 * np.mean([share[kind] for share in shares]):.0f}" for kind in kinds) or _NONE


def _scores(lines: Sequence[Line], key: str) -> str:
    """Mean z-scores by thirds of the layers, over the seeds."""
    if any(None in line[key] or not line[key] for line in lines):
        return _NONE
    thirds = np.mean([[np.mean(part) for part in np.array_split(line[key], 3)] for line in lines], axis=0)
    return " ".join(f"{z:+.2f}" for z in thirds)
