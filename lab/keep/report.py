"""The tables of `run.py`'s results, in Markdown: `python -m lab.keep.report FILE`.

One table per cell, model and number of steps. *Share* is what remains of the nats that `dense` loses at its first
learning rate: 0 is the untrained model, 1 is `dense`. *Text* ends with the form of the task, *questions* is the same
without it. Intervals resample seeds and questions.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.lines import read
from lab.seeds import seed_means
from siftune.report.table import Table, markdown_table

Line = dict[str, Any]
Runs = dict[int, Line]  # by seed

_NONE = "–"


def report(lines: Sequence[Line]) -> str:
    """Write a table for each cell."""
    cells: dict[tuple[Any, ...], dict[str, Runs]] = {}
    for line in lines:
        job = line["job"]
        cell = cells.setdefault((job["cell"]["name"], job["model"], job["steps"], job["batch"]), {})
        name = job["method"]["name"] + (f", lr {job['lr']:g}" if job["method"]["name"] != "untrained" else "")
        cell.setdefault(name, {})[job["seed"]] = line
        for scale, scaled in line.get("scaled", {}).items():
            cell.setdefault(f"{name}, adapter × {scale}", {})[job["seed"]] = {"job": job, **scaled}
    return "\n\n".join(_section(place, runs) for place, runs in cells.items())


def _section(place: tuple[Any, ...], cell: dict[str, Runs]) -> str:
    base = next(name for name in cell if name.startswith("dense"))
    names = sorted({name for runs in cell.values() for line in runs.values() for name in line["others"]})
    rows = []
    for name, runs in cell.items():
        seeds = sorted(set(runs) & set(cell[base]))
        if not seeds:
            continue
        right, nats = (_means(runs, cell[base], seeds, of) for of in ("right", "nll"))
        nats_of = {other: _nats(runs, other) for other in names}
        text, prose = (_means(runs, cell[base], seeds, "others", other) for other in ("text", "prose"))
        rows.append([
            name, str(len(seeds)), f"{right.point['own']:.1f}", _minus(right, name == base, ".1f"),
            f"{nats.point['own']:.3f}", *nats_of.values(),
            _minus(text, name == base, ".2f"), _minus(prose, name == base, ".2f"), _share(cell, runs, base, "text"),
            _share(cell, runs, base, "prose"), _time(runs, cell[base], seeds),
        ])  # fmt: skip
    titles = ["method", "seeds", "correct", "correct − dense", "nats", *names, "text − dense", "prose − dense"]
    titles += ["share of text", "share of prose", "time"]
    heading = f"## {place[0]} ({place[1]}, {place[2]} steps of {place[3]})"
    return f"{heading}\n\n{markdown_table(Table(titles, rows))}"


def _means(runs: Runs, base: Runs, seeds: Sequence[int], of: str, other: str = "") -> Any:
    """Means of a method, "own", and of the base over the same questions."""

    def parts(line: Line) -> tuple[list[float], list[float]]:
        source = line["others"][other] if other else line
        if of == "right":
            return [100.0 * value for value in source["right"]], [1.0] * len(source["right"])
        return source["nll"], source["tokens"]

    values = {name: [parts(of_[seed])[0] for seed in seeds] for name, of_ in (("own", runs), ("base", base))}
    return seed_means(values, [parts(runs[seed])[1] for seed in seeds])


def _minus(means: Any, is_base: bool, form: str) -> str:
    if is_base:
        return _NONE
    found = means.difference("own", "base")
    return f"{found.value:+{form}} [{found.low:+{form}}, {found.high:+{form}}]"


def _share(cell: dict[str, Runs], runs: Runs, base: str, other: str) -> str:
    """What remains of the nats that the base loses, on the seeds that all have."""
    untrained = cell.get("untrained", {})
    shared = [seed for seed in runs if seed in untrained and seed in cell[base]]
    if not shared:
        return _NONE
    own, dense, start = (
        np.mean([_per_token(each[seed], other) for seed in shared]) for each in (runs, cell[base], untrained)
    )
    return f"{(own - start) / (dense - start):.2f}"


def _nats(runs: Runs, other: str) -> str:
    values = [_per_token(line, other) for line in runs.values() if other in line["others"]]
    return f"{np.mean(values):.2f}" if values else _NONE


def _per_token(line: Line, other: str) -> float:
    part = line["others"][other]
    return float(np.sum(part["nll"]) / np.sum(part["tokens"]))


def _time(runs: Runs, base: Runs, seeds: Sequence[int]) -> str:
    """Processor time of a step, relative to dense; with the sampling of own texts in brackets."""
    key = "processor_seconds_per_step"
    shared = [seed for seed in seeds if runs[seed].get(key) and base[seed].get(key)]
    if not shared:
        return _NONE
    step = np.mean([runs[seed][key] / base[seed][key] for seed in shared])
    more = np.mean([
        runs[seed].get("seconds_sampling", 0) / runs[seed]["steps"] / base[seed][key] for seed in shared
    ])  # fmt: skip
    return f"{step:.2f}" + (f" ({step + more:.2f})" if more else "")


def main(argv: list[str] | None = None) -> int:
    """Print the tables of a file; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    lines = read(parser.parse_args(argv).file)
    if not lines:
        raise SystemExit("the file has no finished jobs; give the --out of run.py")
    print(report(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
