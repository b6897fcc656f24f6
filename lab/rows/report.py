"""Tables of finished jobs: `python -m lab.rows.report rows.jsonl`.

Each score against the wrong rows, by kind of error and model, means over seeds and shares; the rows that siftune names,
by its present rule from the recorded losses, against those of siftune 0.1; and what held-out rows gain without the
named rows, with intervals over seeds and questions.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.lines import read
from lab.rows.metrics import interval
from lab.rows.scores import scores_of
from lab.seeds import seed_means
from siftune.report.table import Table, markdown_table
from siftune.suspects.rule import judge

Line = dict[str, Any]
ARMS = ("named", "first", "loss", "random", "truth")
_NAMES = {
    "final": "final loss", "final-mean": "… per token", "rule": "… and decoys", "loss": "first loss",
    "base": "base loss",
    "first": "0.1", "first-source": "0.1, by source",
    "cross-loss": "cross-loss", "cross-least": "cross-least", "cleanlab": "cleanlab", "norm": "gradient norm",
    "cosine": "alignment with the batch", "twins": "twins",
}  # fmt: skip


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
                yield _named(chosen)
        drops = [each for each in own if "arms" in each]
        if drops:
            yield f"## {model}: without the flagged rows"
            yield _drops(drops)


def _by_cell(lines: Sequence[Line]) -> dict[str, list[Line]]:
    cells: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda each: each["job"]["seed"]):
        job = line["job"]
        size = f", {job['rows']} rows, {job['steps']} steps" if job.get("rows") else ""
        arms = f", {' and '.join(job['arms'])} alone" if "arms" in job else ""
        cells.setdefault(job["cell"]["name"] + size + arms, []).append(line)
    return cells


def _scores(lines: Sequence[Line], metric: str) -> str:
    """Scores against cells; the first loss and the score of 0.1 may be of other jobs than the gap."""
    cells = _by_cell([line for line in lines if line["bad"]])
    rows = []
    for name, title in _NAMES.items():
        values = [[line["scores"][name][metric] for line in cell if name in line["scores"]] for cell in cells.values()]
        if any(values):
            rows.append([title, *map(_figure, values)])
    titles = [f"{name} ({len({line['job']['seed'] for line in cell})})" for name, cell in cells.items()]
    return f"{metric}; seeds in brackets\n\n" + markdown_table(Table(["score", *titles], rows))


def _figure(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "–"
    low, high = interval(values)
    return f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"


def _named(lines: Sequence[Line]) -> str:
    rows = []
    for name, cell in _by_cell(lines).items():
        scored = [line for line in cell if "decoys" in line]
        old = [line.get("named_first") or line.get("named_by_source") or line.get("named") for line in cell]
        rows.append([name, *_shares([_counts(line) for line in scored]), *_shares([each for each in old if each])])
    titles = ["cell", "seeds", "suspects", "of them wrong", "… of the wrong", "seeds", "by 0.1", "of them wrong"]
    return "Suspects, and those of siftune 0.1\n\n" + markdown_table(Table([*titles, "… of the wrong"], rows))


def _counts(line: Line) -> dict[str, int]:
    """Suspects by the present rule, the wrong rows among them, and all wrong rows."""
    losses, kinds = np.array(line["losses"]), np.array(line["kinds"] or [0] * line["rows"])
    measured = (line["decoys"], line.get("elsewhere", {}), line.get("decoys_elsewhere", {}))
    verdict = judge(*scores_of(losses, kinds, *measured))
    chosen = verdict.order[: verdict.count].tolist()
    return {"rows": len(chosen), "bad": len({*chosen} & {*line["wrong"]}), "of": line["bad"]}


def _shares(counts: Sequence[dict[str, int]]) -> list[str]:
    """Number of seeds and of suspects, share of wrong rows among them, and of them among the wrong rows."""
    rows, bad, every = (sum(each[name] for each in counts) for name in ("rows", "bad", "of"))
    shares = [f"{100 * bad / of:.0f} %" if of else "–" for of in (rows, every)]
    return [str(len(counts)), str(rows), *shares] if counts else ["–"] * 4


def _drops(lines: Sequence[Line]) -> str:
    rows = []
    for name, cell in _by_cell(lines).items():
        for measure in ("right", "nats"):
            means = _means(cell, measure)
            sign, form = (100, ".1f") if measure == "right" else (1, ".3f")
            cells = [f"{sign * means.point['all']:{form}}"]
            for arm in ARMS:
                if arm not in means.point:
                    cells.append("–")
                    continue
                found = means.difference(arm, "all")
                value, low, high = (sign * float(part or 0) for part in (found.value, found.low, found.high))
                cells.append(f"{value:+{form}} [{low:+{form}}, {high:+{form}}]")
            gone = ", ".join("{rows} ({bad})".format(**line["gone"][_first_arm(line)]) for line in cell)
            rows.append([name, measure, str(len(cell)), gone, *cells])
    titles = ["cell", "measure", "seeds", "rows left out (bad)", "with all", *(f"− {arm}" for arm in ARMS)]
    return markdown_table(Table(titles, rows, words=(0, 1)))


def _first_arm(line: Line) -> str:
    return next(arm for arm in ARMS if arm in line["arms"])


def _means(lines: Sequence[Line], measure: str) -> Any:
    arms = ("all", *(arm for arm in ARMS if all(arm in line["arms"] for line in lines)))
    key = "right" if measure == "right" else "nll"
    values = {arm: [list(map(float, line["arms"][arm][key])) for line in lines] for arm in arms}
    weights = [[1.0] * len(line["arms"]["all"]["right"]) for line in lines]
    if measure == "nats":
        weights = [list(map(float, line["arms"]["all"]["tokens"])) for line in lines]
    return seed_means(values, weights)


if __name__ == "__main__":
    sys.exit(main())
