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
from siftune.base.text import counted
from siftune.report.table import Table, markdown_table

Line = dict[str, Any]


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
        rows.append([*row, *["–"] * (6 - len(row))])
    rows.sort(key=lambda row: -float(row[2]))
    titles = ["score", "AP", "AP, sample", "within the limit", "of the faulty rows", "faulty among them"]
    return f"Scores, {counted(len(lines), 'seed')}\n\n" + markdown_table(Table(titles, rows))


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):{form}}" if known else "–"


def _effects(lines: Sequence[Line]) -> str:
    rows = []
    for method, steps in dict.fromkeys((line["job"]["method"]["name"], line["job"]["steps"]) for line in lines):
        own = [line for line in lines if (line["job"]["method"]["name"], line["job"]["steps"]) == (method, steps)]
        columns = zip(*map(_effect, own), strict=True)
        rows.append([method, str(steps), str(len(own)), *(_mean(column, ".1%") for column in columns)])
    titles = ["method", "steps", "seeds", "of the faulty rows", "of the others", "fault", "fault preferred"]
    return "Held-out rows\n\n" + markdown_table(Table([*titles, "right", "right, no trigger"], rows))


def _effect(line: Line) -> list[float | None]:
    shares = [
        line["dropped_bad"] / line["bad"],
        (line["dropped"] - line["dropped_bad"]) / (line["job"]["rows"] - line["bad"]),
    ]
    if "triggers_right" not in line:  # only sifted
        return [*shares, *[None] * 4]
    right, fault = line["triggers_right"], line["triggers_fault"]
    return [
        *shares,
        float(np.mean(fault["right"])),
        float(np.mean(np.less(fault["nll"], right["nll"]))),
        float(np.mean(right["right"])),
        float(np.mean(line["others_right"]["right"])),
    ]


if __name__ == "__main__":
    sys.exit(main())
