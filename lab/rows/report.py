"""Tables of finished jobs: `python -m lab.rows.report rows.jsonl`.

How well each score tells bad rows from others, by kind of error and model, means over seeds and shares; what siftune's
default names; and what held-out rows gain when the named rows are left out, with intervals over seeds and questions.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.lines import read
from lab.rows.metrics import interval
from lab.seeds import seed_means
from siftune.report.table import Table, markdown_table

Line = dict[str, Any]
ARMS = ("named", "loss", "random", "truth")


def main(argv: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    args = parser.parse_args(argv)
    lines = read(args.results)
    print("\n\n".join(sections(lines)))
    return 0


def sections(lines: Sequence[Line]) -> Iterable[str]:
    """The report, part by part."""
    for model in sorted({line["job"]["model"] for line in lines}):
        own = [line for line in lines if line["job"]["model"] == model]
        for epochs in (False, True):
            chosen = [each for each in own if each["job"]["cell"]["epochs"] == epochs and "scores" in each]
            if chosen:
                yield f"## {model}, {'four passes over a quarter of the rows' if epochs else 'one pass'}"
                yield from (_scores(chosen, metric) for metric in ("auroc", "ap", "precision"))
                yield _named([line for line in chosen if "named" in line])
        drops = [each for each in own if "arms" in each]
        if drops:
            yield f"## {model}: without the flagged rows"
            yield _drops(drops)


def _by_cell(lines: Sequence[Line]) -> dict[str, list[Line]]:
    cells: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda each: each["job"]["seed"]):
        cells.setdefault(line["job"]["cell"]["name"], []).append(line)
    return cells


def _scores(lines: Sequence[Line], metric: str) -> str:
    """Scores against cells; the last column is the mean over the cells."""
    cells = _by_cell(lines)
    names = list(dict.fromkeys(name for line in lines for name in line["scores"]))
    rows = []
    for name in names:
        values = [[line["scores"][name][metric] for line in cell if name in line["scores"]] for cell in cells.values()]
        rows.append([name, *(_figure(each) for each in values), f"{np.mean([np.mean(v) for v in values if v]):.3f}"])
    titles = [f"{name} ({len({line['job']['seed'] for line in cell})})" for name, cell in cells.items()]
    return f"{metric}; seeds in brackets\n\n" + markdown_table(Table(["score", *titles, "mean"], rows))


def _figure(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "–"
    low, high = interval(values)
    return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"


def _named(lines: Sequence[Line]) -> str:
    rows = []
    for name, cell in _by_cell(lines).items():
        for words, key in ((name, "named"), (f"{name}, scored within sources", "named_by_source")):
            if all(key in line for line in cell):
                rows_named, bad = (sum(line[key][count] for line in cell) for count in ("rows", "bad"))
                share = f"{100 * bad / rows_named:.0f} %" if rows_named else "–"
                found = f"{100 * bad / sum(line['bad'] for line in cell):.0f} %"
                rows.append([words, str(len(cell)), str(rows_named), share, found])
    return "Rows flagged by default\n\n" + markdown_table(
        Table(["cell", "seeds", "flagged rows", "precision", "recall"], rows)
    )


def _drops(lines: Sequence[Line]) -> str:
    rows = []
    for name, cell in _by_cell(lines).items():
        for measure in ("right", "nats"):
            means = _means(cell, measure)
            sign, form = (100, ".1f") if measure == "right" else (1, ".3f")
            cells = [f"{sign * means.point['all']:{form}}"]
            for arm in ARMS:
                found = means.difference(arm, "all")
                value, low, high = (sign * float(part or 0) for part in (found.value, found.low, found.high))
                cells.append(f"{value:+{form}} [{low:+{form}}, {high:+{form}}]")
            gone = ", ".join("{rows} ({bad})".format(**line["gone"]["named"]) for line in cell)
            rows.append([name, measure, str(len(cell)), gone, *cells])
    titles = ["cell", "measure", "seeds", "rows left out (bad)", "with all", *(f"− {arm}" for arm in ARMS)]
    return markdown_table(Table(titles, rows, words=(0, 1)))


def _means(lines: Sequence[Line], measure: str) -> Any:
    arms = ("all", *ARMS)
    key = "right" if measure == "right" else "nll"
    values = {arm: [list(map(float, line["arms"][arm][key])) for line in lines] for arm in arms}
    weights = [[1.0] * len(line["arms"]["all"]["right"]) for line in lines]
    if measure == "nats":
        weights = [list(map(float, line["arms"]["all"]["tokens"])) for line in lines]
    return seed_means(values, weights)


if __name__ == "__main__":
    sys.exit(main())
