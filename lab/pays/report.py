"""The tables of `run.py`'s results, in Markdown: `python -m lab.pays.report FILE`.

For each cell: every method at its best learning rate, which is that of the least loss on further held-out rows (`dev`),
over the seeds that all of its rates have. Differences to `dense` are paired, the same questions and the same seed on
both sides; their intervals are bootstrapped over seeds, and within each seed over its questions. With few seeds
these intervals are too narrow by about √((S − 1)/S); with one seed they cover other questions only.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.lines import read
from lab.seeds import seed_means
from siftune.evaluate.bootstrap import Estimate, Means
from siftune.report.table import Table, markdown_table

Line = dict[str, Any]
Runs = dict[int, Line]  # one method at one rate, by seed
Cell = dict[str, dict[float, Runs]]  # method -> rate -> runs

BASE, CEILING = "dense", "ceiling"
_NONE = "–"


def report(lines: Sequence[Line]) -> str:
    """Write the tables of every cell, and one over all cells of a scenario."""
    sections = grouped(lines)
    parts = [_section(heading, cell) for heading, cell in sections.items()]
    return "\n".join([*parts, *_overviews(sections)])


def differences(lines: Sequence[Line], base: str) -> str:
    """Write a table of the paired differences of all methods to one of them, in every cell that has it."""
    rows = []
    for (where, cell_name), cell in grouped(lines).items():
        best = {name: rates[best_rate(rates)] for name, rates in cell.items()}
        for name in best if base in best else ():
            if name != base:
                (right, seeds), (nats, _) = (compare(name, best, of, [base]) for of in ("right", "nats"))
                minus = [_minus(right, name, ".1f", base=base), _minus(nats, name, ".3f", -1, base)]
                rows.append([cell_name, where, name, str(len(seeds)), *minus])
    titles = ["cell", "scenario", "method", "seeds", f"correct − {base}", f"nats − {base}"]
    return markdown_table(Table(titles, rows))


def grouped(lines: Sequence[Line]) -> dict[tuple[str, str], Cell]:
    """Sort runs by (scenario and model, cell), method, rate and seed; the last of equal jobs counts.

    A cell has one number of steps, its most frequent one; of methods with another it stands behind their names.
    """
    steps: dict[tuple[str, ...], Counter[int]] = {}
    for line in lines:
        steps.setdefault(_place(line["job"]), Counter())[line["job"]["steps"]] += 1
    sections: dict[tuple[str, str], Cell] = {}
    names: dict[str, str] = {}  # method in full -> what it is called: variants may share a name
    for line in lines:
        job = line["job"]
        usual = steps[_place(job)].most_common(1)[0][0]
        where = f"{job['scenario']}, {job['model']}, {usual} steps of {job['batch']}"
        cell = sections.setdefault((where, f"{job['cell']['name']}, {job['cell']['known']} known"), {})
        name = names.setdefault(json.dumps(job["method"], sort_keys=True), _free(job["method"]["name"], names))
        name += f", {job['steps']} steps" if job["steps"] != usual else ""
        cell.setdefault(name, {}).setdefault(job["lr"], {})[job["seed"]] = line
    return sections


def _place(job: Line) -> tuple[str, ...]:
    return job["scenario"], job["model"], str(job["batch"]), job["cell"]["name"], str(job["cell"]["known"])


def _free(name: str, names: Mapping[str, str]) -> str:
    taken = set(names.values())
    return next(free for free in [name, *(f"{name} ({i})" for i in range(2, len(taken) + 3))] if free not in taken)


def best_rate(rates: Mapping[float, Runs]) -> float:
    """The rate of the least loss on `dev` rows, over the seeds that all rates have, or all seeds if none."""
    shared = set.intersection(*(set(runs) for runs in rates.values()))

    def loss(rate: float) -> float:
        runs = rates[rate]
        return float(np.mean([runs[seed]["dev_nats"] for seed in shared or runs]))

    return min(rates, key=loss)


def compare(
    name: str, best: Mapping[str, Runs], of: str, others: Sequence[str] = (BASE, CEILING)
) -> tuple[Means, list[int]]:
    """Means of a method and of others where there are such, on the seeds that they share.

    Args:
        name: The method.
        best: Methods' runs at their best rates.
        of: "right", in per cent, or "nats", per token; negative, so that more is better.
        others: Dense and the ceiling, if not given.
    """
    shown = [other for other in dict.fromkeys((name, *others)) if other in best]
    seeds = sorted(set.intersection(*(set(best[other]) for other in shown)))
    if not seeds:
        shown, seeds = [name], sorted(best[name])
    runs = {other: [best[other][seed] for seed in seeds] for other in shown}
    if of == "right":
        values = {other: [[100.0 * one for one in line["right"]] for line in lines] for other, lines in runs.items()}
        weights = [[1.0] * len(line["right"]) for line in runs[name]]
    else:
        values = {other: [[-one for one in line["nll"]] for line in lines] for other, lines in runs.items()}
        weights = [line["tokens"] for line in runs[name]]
    return seed_means(values, weights), seeds


def _section(heading: tuple[str, str], cell: Cell) -> str:
    best = {name: rates[best_rate(rates)] for name, rates in cell.items()}
    seeds = max(len(runs) for runs in best.values())
    note = "One seed: intervals over its questions only." if seeds == 1 else "Intervals over seeds and questions."
    parts = [
        f"## {heading[1]} ({heading[0]})",
        f"{note} Correct answers in per cent, nats per token of the correct answer.",
    ]
    parts.append(_quality(cell, best))
    if any(len(rates) > 1 for rates in cell.values()):
        parts += ["Every rate, correct / nats, mean over its seeds:", _rates(cell)]
    parts += (
        ["Rows followed, in per cent:", _followed(best)] if any("followed" in _any(r) for r in best.values()) else []
    )
    parts += ["Loss of other tasks and of text, nats per token:", _others(best)]
    return "\n\n".join(parts) + "\n"


def _any(runs: Runs) -> Line:
    return next(iter(runs.values()))


def _quality(cell: Cell, best: Mapping[str, Runs]) -> str:
    rows = []
    for name, rates in cell.items():
        (right, seeds), (nats, _) = (compare(name, best, of) for of in ("right", "nats"))
        whole = CEILING in nats.point and BASE in nats.point and name not in (BASE, CEILING)
        rows.append([
            name, f"{best_rate(rates):g} of {len(rates)}", str(len(seeds)),
            f"{right.point[name]:.1f}", f"{-nats.point[name]:.3f}",
            _minus(right, name, ".1f"), _minus(nats, name, ".3f", -1),
            _percent(nats.share(name, BASE, CEILING)) if whole else _NONE,
            _mean_share(best[name], "followed", "batches"), _time(best, name),
        ])  # fmt: skip
    titles = [
        "method",
        "best lr, of N",
        "seeds",
        "correct",
        "nats",
        "correct − dense",
        "nats − dense",
        "dense → ceiling",
    ]
    return markdown_table(Table([*titles, "target followed", "time"], rows))


def _minus(means: Means, name: str, form: str, sign: int = 1, base: str = BASE) -> str:
    """The difference to dense, or another, with its interval; `sign` −1 turns it around."""
    if name == base or base not in means.point:
        return _NONE
    found = means.difference(name, base)
    value, low, high = (sign * float(number or 0) for number in (found.value, found.low, found.high))
    return f"{value:+{form}} [{min(low, high):+{form}}, {max(low, high):+{form}}]"


def _percent(share: Estimate) -> str:
    """A share of the way to the ceiling; without bounds there is none: the ceiling is no further than chance goes."""
    if share.value is None or share.low is None:
        return _NONE
    assert share.high is not None
    return f"{100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def _mean_share(runs: Runs, *keys: str) -> str:
    """Share of the target's rows, known ones among them, by the first of the keys that a run has."""
    found = [next((line[key] for key in keys if key in line), None) for line in runs.values()]
    shares = [share.get("target", 0) + share.get("known", 0) for share in found if share]
    return f"{100 * np.mean(shares):.0f} %" if shares else _NONE


def _time(best: Mapping[str, Runs], name: str) -> str:
    """Processor time of a step, relative to dense on the seeds that both have."""
    key = "processor_seconds_per_step"
    shared = [seed for seed, line in best[name].items() if key in line and key in best.get(BASE, {}).get(seed, {})]
    if not shared:
        return _NONE
    return f"{np.mean([best[name][seed][key] / best[BASE][seed][key] for seed in shared]):.2f}"


def _rates(cell: Cell) -> str:
    every = sorted({rate for rates in cell.values() for rate in rates})
    rows = [
        [name, *(_figures(rates[rate]) if rate in rates else _NONE for rate in every)] for name, rates in cell.items()
    ]
    return markdown_table(Table(["method", *(f"{rate:g}" for rate in every)], rows))


def _figures(runs: Runs) -> str:
    right = np.mean([np.mean(line["right"]) for line in runs.values()])
    nll, tokens = (sum(sum(line[key]) for line in runs.values()) for key in ("nll", "tokens"))
    return f"{100 * right:.1f} / {nll / tokens:.3f} ({len(runs)})"


def _followed(best: Mapping[str, Runs]) -> str:
    """Shares by group, then those of the target by quarters of training and thirds of depth, mean over seeds."""
    rows = []
    for name, runs in best.items():
        lines = [line for line in runs.values() if "followed" in line]
        if lines:
            groups = dict.fromkeys(group for line in lines for group in line["followed"])
            shares = (f"{group} {100 * np.mean([line['followed'][group] for line in lines]):.0f}" for group in groups)
            rows.append([name, ", ".join(shares), _parts(lines, "quarters"), _parts(lines, "thirds")])
    titles = ["method", "all", "target by quarters of training", "target in lower, middle, upper layers"]
    return markdown_table(Table(titles, rows))


def _parts(lines: Sequence[Line], key: str) -> str:
    parts = [line[key] for line in lines if key in line]
    if not parts:
        return _NONE
    means = ([part[i]["target"] for part in parts if "target" in part[i]] for i in range(len(parts[0])))
    return " ".join(f"{100 * np.mean(shares):.0f}" if shares else _NONE for shares in means)


def _others(best: Mapping[str, Runs]) -> str:
    names = dict.fromkeys(other for runs in best.values() for line in runs.values() for other in line["other_nats"])
    rows = [
        [
            name,
            *(f"{np.mean([line['other_nats'].get(other, np.nan) for line in runs.values()]):.3f}" for other in names),
        ]
        for name, runs in best.items()
    ]
    return markdown_table(Table(["method", *names], rows))


def _overviews(sections: Mapping[tuple[str, str], Cell]) -> list[str]:
    """Per scenario and model, what each method gains over dense in nats, cell by cell."""
    parts = []
    for where in dict.fromkeys(heading[0] for heading in sections):
        cells = {heading[1]: cell for heading, cell in sections.items() if heading[0] == where}
        if len(cells) > 1:
            parts.append(f"## All cells ({where})\n\nNats − dense; lower is better.\n\n{_overview(cells)}\n")
    return parts


def _overview(cells: Mapping[str, Cell]) -> str:
    rows = []
    for name in dict.fromkeys(name for cell in cells.values() for name in cell):
        found = [_gain(cell, name) for cell in cells.values()]
        known = [gain for gain in found if gain is not None]
        texts = [_NONE if gain is None else f"{gain:+.3f}" for gain in found]
        mean, worst = (f"{f(known):+.3f}" if known else _NONE for f in (np.mean, max))
        rows.append([name, *texts, mean, worst])
    return markdown_table(Table(["method", *cells, "mean of its cells", "worst"], rows))


def _gain(cell: Cell, name: str) -> float | None:
    if name not in cell or BASE not in cell or name == BASE:
        return None
    means, _ = compare(name, {other: rates[best_rate(rates)] for other, rates in cell.items()}, "nats")
    return means.point[BASE] - means.point[name] if BASE in means.point else None


def _is_wanted(job: Line, lr: float | None, methods: str | None) -> bool:
    return lr in (None, job["lr"]) and (methods is None or job["method"]["name"] in methods.split(","))


def main(argv: list[str] | None = None) -> int:
    """Print the tables of a file; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--lr", type=float, help="runs at this rate alone, for tables over more seeds")
    parser.add_argument("--methods", help="these methods alone, with commas between: all are compared on shared seeds")
    parser.add_argument("--against", metavar="METHOD", help="paired differences to this method alone")
    args = parser.parse_args(argv)
    lines = [line for line in read(args.file) if _is_wanted(line["job"], args.lr, args.methods)]
    if not lines:
        raise SystemExit(f"{args.file} has no such finished jobs; give the --out of run.py")
    print(report(lines) if args.against is None else differences(lines, args.against))
    return 0


if __name__ == "__main__":
    sys.exit(main())
