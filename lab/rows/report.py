"""Tables of suspect rows: `python -m lab.rows.report rows.jsonl`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.lines import read
from lab.rows.job import LOSSES
from lab.rows.metrics import auroc, lowest, precision
from siftune.report.table import Table, markdown_table
from siftune.suspects.decoys import SHARED
from siftune.suspects.rule import judge

Line = dict[str, Any]
_SCORES = ("score", "loss", "per token", "loss, trained on")


def main(argv: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    print(report(read(parser.parse_args(argv).results)))
    return 0


def report(lines: Sequence[Line]) -> str:
    """The list of each job, and AUROC and precision among as many rows as are wrong, by score."""
    lists, scores = [], []
    for line in sorted(lines, key=lambda one: (one["job"]["model"], one["job"]["cell"]["name"], one["job"]["seed"])):
        job, cell, count = line["job"], line["job"]["cell"], line["rows"]
        known = f", {cell['known']} correct rows as target" if cell["known"] else ""
        name = [job["model"], f"{cell['name']}{known}", f"{job['lr']:g}", str(job["epochs"]), str(job["seed"])]
        bad = np.isin(np.arange(count), line["wrong"])
        losses = [np.array(line["losses"][name], dtype=np.float64) for name in LOSSES]  # None becomes NaN
        verdict = judge(*losses, shared=line["covered"] >= SHARED)
        suspects, wrong = verdict.count, int(bad[verdict.order[: verdict.count]].sum())
        shares = [f"{100 * part / of:.0f} %" if of else "–" for part, of in ((wrong, suspects), (wrong, bad.sum()))]
        lists.append([*name, str(count), str(bad.sum()), str(suspects), *shares, verdict.doubt or "–"])
        if bad.any():
            values = [verdict.score, losses[0], losses[0] / np.array(line["tokens"])]
            values += [np.array(line["trained_on"])] if "trained_on" in line else []
            figures = [f"{auroc(one, bad):.3f}, {precision(one, bad):.0%}" for one in map(lowest, values)]
            scores.append([*name, *figures, *["–"] * (4 - len(figures))])
    names = ["model", "pool", "lr", "passes", "seed"]
    titles = [*names, "rows", "wrong", "suspects", "of them wrong", "of the wrong ones", "if none, why"]
    every, ordered = Table(titles, lists, words=(0, 1, 10)), Table([*names, *_SCORES], scores, words=(0, 1))
    return f"{markdown_table(every)}\n\nAUROC, precision@k\n\n{markdown_table(ordered)}"


if __name__ == "__main__":
    sys.exit(main())
