"""The tables of `run.py`'s results, in Markdown: `python -m lab.pays.report FILE`.

For each cell: every method at its best learning rate, which is that of the least loss on further held-out rows (`dev`)
among the rates with the most seeds: rates are swept on one seed, and the best ones are repeated. The base of a cell is
what its target's rows do without a choice of other rows: `few` or `target`, whichever has more correct answers, or
`dense` if there is neither. Differences to the base are paired, the same questions and the same seed on both sides;
their intervals are bootstrapped over seeds, and within each seed over its questions. With few seeds these intervals are
too narrow by about √((S − 1)/S); with one seed they cover other questions only.
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

_NONE = "–"
_BASES = tuple(name + dtype for name in ("few", "target") for dtype in ("", ", float32", ", bfloat16"))
_DENSE = "dense"
_CEILINGS = ("oracle", "ceiling")  # the correct rows of the task; in earlier lines without the target's rows


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
                minus = [_minus(right, name, ".1f", base), _minus(nats, name, ".3f", base, -1)]
                rows.append([cell_name, where, name, str(len(seeds)), *minus])
    titles = ["cell", "scenario", "method", "seeds", f"correct − {base}", f"nats − {base}"]
    return markdown_table(Table(titles, rows))


def grouped(lines: Sequence[Line]) -> dict[tuple[str, str], Cell]:
    """Sort runs by (scenario and model, cell), method, rate and seed; the last of equal jobs counts.

    A cell has one number of steps, its most frequent one; of methods with another it stands behind their names. Of
    variants that share a name, later ones have their dtype behind it, or a number.
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
        name = names.setdefault(json.dumps(job["method"], sort_keys=True), _free(line, names))
        name += f", {job['steps']} steps" if job["steps"] != usual else ""
        cell.setdefault(name, {}).setdefault(job["lr"], {})[job["seed"]] = line
    return sections


def _place(job: Line) -> tuple[str, ...]:
    return job["scenario"], job["model"], str(job["batch"]), job["cell"]["name"], str(job["cell"]["known"])


def _free(line: Line, names: Mapping[str, str]) -> str:
    name, taken = line["job"]["method"]["name"], set(names.values())
    with_dtype = [f"{name}, {line['dtype']}"] if "dtype" in line else []
    numbered = (f"{name} ({i})" for i in range(2, len(taken) + 3))
    return next(free for free in [name, *with_dtype, *numbered] if free not in taken)


def best_rate(rates: Mapping[float, Runs]) -> float:
    """The rate of the least loss on `dev` rows among those with the most seeds, over the seeds that they share."""
    most = max(len(runs) for runs in rates.values())
    candidates = {rate: runs for rate, runs in rates.items() if len(runs) == most}
    shared = set.intersection(*(set(runs) for runs in candidates.values()))

    def loss(rate: float) -> float:
        runs = rates[rate]
        return float(np.mean([runs[seed]["dev_nats"] for seed in shared or runs]))

    return min(candidates, key=loss)


def base_of(best: Mapping[str, Runs]) -> str:
    """The method that others are compared with.

    Args:
        best: Methods' runs at their best rates.
    """
    own = [name for name in best if name in _BASES]
    return max(own, key=lambda name: _right(best[name])) if own else _DENSE if _DENSE in best else next(iter(best))


def _right(runs: Runs) -> float:
    return float(np.mean([np.mean(line["right"]) for line in runs.values()]))


def _ceiling_of(best: Mapping[str, Runs]) -> str | None:
    return next((name for name in _CEILINGS if name in best), None)


def compare(name: str, best: Mapping[str, Runs], of: str, others: Sequence[str | None]) -> tuple[Means, list[int]]:
    """Means of a method and of others where there are such, on the seeds that they share.

    Args:
        name: The method.
        best: Methods' runs at their best rates.
        of: "right", in per cent, or "nats", per token; negative, so that more is better.
        others: The other methods.
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
    base = base_of(best)
    seeds = max(len(runs) for runs in best.values())
    intervals = "One seed: intervals over its questions only." if seeds == 1 else "Intervals over seeds and questions."
    note = f"Base: {base}. {intervals} Correct answers in per cent, nats per token of the correct answer."
    parts = [f"## {heading[1]} ({heading[0]})", note, _quality(cell, best, base)]
    if any(len(rates) > 1 for rates in cell.values()):
        parts += ["Every rate, correct / nats, mean over its seeds:", _rates(cell)]
    if any("other_nats" in line for runs in best.values() for line in runs.values()):
        parts += ["Loss of other tasks and of text, nats per token:", _others(best)]
    return "\n\n".join(parts) + "\n"


def _quality(cell: Cell, best: Mapping[str, Runs], base: str) -> str:
    rows, ceiling = [], _ceiling_of(best)
    selects = any("groups" in line for runs in best.values() for line in runs.values())
    for name, rates in cell.items():
        (right, seeds), (nats, _) = (compare(name, best, of, [base]) for of in ("right", "nats"))
        bounded, _ = compare(name, best, "nats", [base, ceiling])  # on the seeds of the ceiling, which may be fewer
        between = ceiling in bounded.point and base in bounded.point and name not in (base, ceiling)
        rows.append([
            name, f"{best_rate(rates):g} of {len(rates)}", str(len(seeds)),
            f"{right.point[name]:.1f}", f"{-nats.point[name]:.3f}",
            _minus(right, name, ".1f", base), _minus(nats, name, ".3f", base, -1),
            *([_percent(bounded.share(name, base, ceiling)) if between else _NONE] if ceiling else []),
            *(_selected(best[name]) if selects else []), _time(best, name, base),
        ])  # fmt: skip
    titles = ["method", "best lr, of N", "seeds", "correct", "nats", f"correct − {base}", f"nats − {base}"]
    titles += [f"{base} → {ceiling}"] if ceiling else []
    titles += ["rows selected", "of these wrong", "of the correct rows"] if selects else []
    return markdown_table(Table([*titles, "time"], rows))


def _minus(means: Means, name: str, form: str, base: str, sign: int = 1) -> str:
    """The difference to the base with its interval; `sign` −1 turns it around."""
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


def _selected(runs: Runs) -> list[str]:
    """Rows that a method selected, the share of wrong ones among them, and that of the correct rows; means over seeds.

    Example:
        >>> _selected({0: {"selected": 8, "groups": {"target": [10, 6], "wrong": [10, 2], "slots": [20, 0]}}})
        ['8', '25 %', '60 %']
    """
    lines = [line for line in runs.values() if "groups" in line]
    if not lines:
        return [_NONE] * 3
    wrong = [line["groups"].get("wrong", [0, 0])[1] / max(1, line["selected"]) for line in lines]
    correct = [line["groups"]["target"][1] / line["groups"]["target"][0] for line in lines]
    shares = [f"{100 * np.mean(part):.0f} %" for part in (wrong, correct)]
    return [f"{np.mean([line['selected'] for line in lines]):.0f}", *shares]


def _time(best: Mapping[str, Runs], name: str, base: str) -> str:
    """Processor time relative to the base, on the seeds that both have on one machine.

    It is that of the commands, in earlier lines of a step.
    """
    shared = [(line, best[base][seed]) for seed, line in best[name].items() if seed in best[base]]
    pairs = [(own, other) for own, other in shared if own.get("hardware") == other.get("hardware")]
    for key in ("processor_seconds", "processor_seconds_per_step"):
        ratios = [own[key] / other[key] for own, other in pairs if key in own and key in other]
        if ratios:
            return f"{np.mean(ratios):.2f}"
    return _NONE


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


def _others(best: Mapping[str, Runs]) -> str:
    names = dict.fromkeys(
        other for runs in best.values() for line in runs.values() for other in line.get("other_nats", ())
    )
    rows = [
        [
            name,
            *(
                f"{np.mean([line.get('other_nats', {}).get(other, np.nan) for line in runs.values()]):.3f}"
                for other in names
            ),
        ]
        for name, runs in best.items()
    ]
    return markdown_table(Table(["method", *names], rows))


def _overviews(sections: Mapping[tuple[str, str], Cell]) -> list[str]:
    """Per scenario and model, the difference of each method to the base, cell by cell."""
    parts = []
    for where in dict.fromkeys(heading[0] for heading in sections):
        cells = {heading[1]: cell for heading, cell in sections.items() if heading[0] == where}
        if len(cells) > 1:
            parts.append(f"## All cells ({where})")
            parts += [f"Correct answers − base, points:\n\n{_overview(cells, 'right')}"]
            parts += [f"Nats − base; lower is better:\n\n{_overview(cells, 'nats')}\n"]
    return parts


def _overview(cells: Mapping[str, Cell], of: str) -> str:
    rows, form, worst = [], *({"right": ("+.1f", min), "nats": ("+.3f", max)}[of])
    for name in dict.fromkeys(name for cell in cells.values() for name in cell):
        values = [_gain(cell, name, of) for cell in cells.values()]
        own = [value for value in values if value is not None]
        texts = [_NONE if value is None else f"{value:{form}}" for value in values]
        rows.append([name, *texts, *(f"{f(own):{form}}" if own else _NONE for f in (np.mean, worst))])
    return markdown_table(Table(["method", *cells, "mean of its cells", "worst"], rows))


def _gain(cell: Cell, name: str, of: str) -> float | None:
    best = {other: rates[best_rate(rates)] for other, rates in cell.items()}
    base = base_of(best)
    if name not in cell or name == base:
        return None
    means, _ = compare(name, best, of, [base])
    sign = 1 if of == "right" else -1
    return sign * (means.point[name] - means.point[base]) if base in means.point else None


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
