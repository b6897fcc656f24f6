"""Tables of suspect rows: `python -m lab.rows.report rows.jsonl`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.lines import read
from siftune.report.table import Table, markdown_table

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
        job, suspects, wrong = line["job"], line["suspects"], line["suspects_bad"]
        cell = job["cell"]
        known = f", {cell['known']} correct rows as target" if cell["known"] else ""
        name = [job["model"], f"{cell['name']}{known}", f"{job['lr']:g}", str(job["epochs"]), str(job["seed"])]
        shares = [f"{100 * part / of:.0f} %" if of else "–" for part, of in ((wrong, suspects), (wrong, line["bad"]))]
        lists.append([*name, str(line["rows"]), str(line["bad"]), str(suspects), *shares])
        if line["bad"]:
            values = [line["scores"].get(kind) for kind in _SCORES]
            scores.append([*name, *(f"{one['auroc']:.3f}, {one['precision']:.0%}" if one else "–" for one in values)])
    names = ["model", "pool", "lr", "passes", "seed"]
    every = Table([*names, "rows", "wrong", "suspects", "of them wrong", "of the wrong ones"], lists, words=(0, 1))
    ordered = Table([*names, *_SCORES], scores, words=(0, 1))
    return f"{markdown_table(every)}\n\nAUROC, precision@k\n\n{markdown_table(ordered)}"


if __name__ == "__main__":
    sys.exit(main())
