"""Tables of finished jobs: `python -m lab.avoid.report avoid.jsonl`.

Held-out rows after training without the rows that a method leaves out: the fault is given, or preferred to the right
answer. Earlier lines also have every score against the faulty rows: average precision on the complete pool and on the
rows that gradients score, and the rows within the limit; there, the name of a score is a training without the rows
within its limit.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.lines import read
from lab.seeds import seed_means
from siftune.base.text import counted
from siftune.report.table import Table, markdown_table

Line = dict[str, Any]

_NONE = "–"


def main(argv: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    print(report(read(parser.parse_args(argv).results)))
    return 0


def report(lines: Sequence[Line]) -> str:
    """All tables, cell by cell."""
    return "\n\n".join(_sections(lines))


def _sections(lines: Sequence[Line]) -> Iterator[str]:
    cells = dict.fromkeys((line["job"]["cell"]["name"], line["job"]["cell"]["known"]) for line in lines)
    for name, bad in cells:
        own = [line for line in lines if (line["job"]["cell"]["name"], line["job"]["cell"]["known"]) == (name, bad)]
        yield f"## {name}, {bad} bad rows, {own[0]['job']['rows']} rows"
        if scored := [line for line in own if "scores" in line]:
            yield _scores(scored)
        if trained := [line for line in own if "dropped" in line]:
            yield _effects(trained)


def _scores(lines: Sequence[Line]) -> str:
    rows = []
    for name in lines[0]["scores"]:
        parts = [line["scores"][name] for line in lines]
        row: list[str] = [name, *(_mean([part.get(key) for part in parts], ".3f") for key in ("ap", "sample_ap"))]
        if "chosen" in parts[0]:
            shares = [part["chosen_bad"] / max(1, part["chosen"]) for part in parts]
            row += [_mean([part["chosen"] for part in parts], ".0f")]
            row += [_mean([part["recall"] for part in parts], ".0%"), _mean(shares, ".0%")]
        rows.append([*row, *[_NONE] * (6 - len(row))])
    rows.sort(key=lambda row: -float(row[2]))
    titles = ["score", "AP", "AP, sample", "within the limit", "of the faulty rows", "faulty among them"]
    return f"Scores, {counted(len(lines), 'seed')}\n\n" + markdown_table(Table(titles, rows))


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):{form}}" if known else _NONE


def _effects(lines: Sequence[Line]) -> str:
    measured = [line for line in lines if "triggers_fault" in line]
    dense = [line for line in measured if line["job"]["method"]["name"] == "dense"]
    dense.sort(key=lambda line: line["job"]["steps"])  # the base is the shortest
    rows = []
    for line in lines:
        job = line["job"]
        base = next((other for other in dense if other["job"]["seed"] == job["seed"]), None)
        rows.append([job["method"]["name"], str(job["steps"]), str(job["seed"]), *_effect(line, base)])
    titles = ["method", "steps", "seed", "of the faulty rows", "of the others", "fault", "fault − dense, points"]
    return "Held-out rows\n\n" + markdown_table(Table([*titles, "fault preferred", "right", "right, no trigger"], rows))


def _effect(line: Line, base: Line | None) -> list[str]:
    shares = [
        line["dropped_bad"] / line["bad"],
        (line["dropped"] - line["dropped_bad"]) / (line["job"]["rows"] - line["bad"]),
    ]
    if "triggers_right" not in line:  # only sifted
        return [*(f"{share:.1%}" for share in shares), *[_NONE] * 5]
    right, fault = line["triggers_right"], line["triggers_fault"]
    means = [
        np.mean(fault["right"]),
        np.mean(np.less(fault["nll"], right["nll"])),
        np.mean(right["right"]),
        np.mean(line["others_right"]["right"]),
    ]
    shown = [f"{value:.1%}" for value in (*shares, *means)]
    return [*shown[:3], _NONE if base is None or base is line else _minus(line, base), *shown[3:]]


def _minus(line: Line, base: Line) -> str:
    """Difference of the faults to those of another run, in points, with its interval over their questions."""
    values = {name: [100.0 * np.array(one["triggers_fault"]["right"])] for name, one in (("own", line), ("base", base))}
    found = seed_means(values, [np.ones(len(values["own"][0]))]).difference("own", "base")
    return f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


if __name__ == "__main__":
    sys.exit(main())
