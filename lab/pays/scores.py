"""How well scores of a pool separate wrong rows, from the losses that `siftune sift` recorded.

    python -m lab.pays.scores CELL --data FOLDER --out scores.jsonl [--rows 600] [--seed 0] [--known 100]

It writes the pool and the target of a cell, runs `siftune sift`, adds a line, and prints all lines: for each score the
area under the ROC curve of wrong rows against correct ones of the task, and for the rows that the command selects the
share of wrong ones and the share of the correct rows that remain.
"""

import argparse
import csv
import json
import tempfile
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.commands import Commands, settings_of, write_rows
from lab.lines import append, commit, read
from lab.pays.cells import cells_of
from lab.pays.job import draw
from lab.pays.pool import asked
from siftune.base.environment import hardware
from siftune.report.table import Table, markdown_table
from siftune.sifting.choose import separation

Floats = NDArray[np.float64]
Line = dict[str, Any]
SCORES = ("K / n", "K / √n", "K", "K − least of 2", "K − least of 8", "siftune sift")


def compare(job: Line, data: Path) -> Line:
    """Sift the pool of a job in the working directory, and compare scores."""
    pool = draw(job, data)
    for name, rows in (("pool", pool.train), ("few", pool.known)):
        write_rows(f"{name}.jsonl", [asked(row) for row in rows])
    commands = Commands()
    commands.run("sift", "--train", "pool.jsonl", "--target", "few.jsonl", *settings_of(job, "none"), "--out", "sifted")
    assert commands.sifted is not None
    groups = np.array([row["group"] for row in pool.train])
    scores = {name: np.full(len(groups), np.nan) for name in SCORES}
    selected = np.zeros(len(groups), bool)
    selected[list(commands.sifted.selected)] = True
    with Path("sifted/scores.csv").open(encoding="utf-8") as file:
        numbers = [int(line["place"].rpartition(":")[2]) - 1 for line in csv.DictReader(file)]  # without copies
    scores["siftune sift"][numbers] = commands.sifted.scores
    for line in map(json.loads, Path("sifted/losses.jsonl").read_text(encoding="utf-8").splitlines()):
        for row, tokens, own, others in zip(line["rows"], line["tokens"], line["own"], line["others"], strict=True):
            if row < len(numbers):  # not of the target
                for name, value in _formulas(own, tokens, [each for each in others if each is not None]).items():
                    scores[name][numbers[row]] = value
    correct, wrong = groups == "target", groups == "wrong"
    return {
        "rows": len(groups),
        "wrong": round(float(wrong.sum() / (correct | wrong).sum()), 4),
        "selected": int(selected.sum()),
        "selected_wrong": round(float(wrong[selected].mean()), 4),
        "selected_others": round(float((~correct & ~wrong)[selected].mean()), 4),
        "retained": round(float(selected[correct].mean()), 4),
        "auc": {name: _auc(values, wrong, correct) for name, values in scores.items()},
        "reason": commands.sifted.reason,
        "processor_seconds": round(commands.seconds, 1),
        "commands": commands.texts,
    }


def _formulas(own: float, tokens: float, others: Sequence[float]) -> dict[str, float]:
    values = {"K / n": own / tokens, "K / √n": own / tokens**0.5, "K": own}
    return values | {f"K − least of {count}": own - min(others[:count]) for count in (2, 8) if others}


def _auc(scores: Floats, wrong: NDArray[np.bool_], correct: NDArray[np.bool_]) -> float | None:
    scored = ~np.isnan(scores)
    if not (wrong & scored).any() or not (correct & scored).any():
        return None
    return round(separation(scores[wrong & scored], scores[correct & scored]), 4)


def report(lines: Sequence[Line]) -> str:
    """The table of recorded lines."""
    rows = []
    for line in lines:
        job = line["job"]
        auc = [f"{value:.3f}" if (value := line["auc"][name]) is not None else "–" for name in SCORES]
        shares = [f"{100 * line[name]:.0f} %" for name in ("wrong", "selected_wrong", "selected_others", "retained")]
        rows.append([job["model"], job["cell"]["name"], str(job["seed"]), str(line["rows"]), *auc, *shares])
    titles = ["wrong", "of the selected", "other tasks of the selected", "correct rows that remain"]
    table = Table(["model", "pool", "seed", "rows", *SCORES, *titles], rows, words=(0, 1))
    return f"AUC of wrong rows of the task, by score\n\n{markdown_table(table)}"


def main(argv: list[str] | None = None) -> int:
    """Add the line of a cell; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("cell", help="a cell of S1 or N, such as mix or intents-a")
    add("--data", type=Path, default=Path())
    add("--out", type=Path, required=True)
    add("--rows", type=int, help="rows of the pool")
    add("--seed", type=int, default=0)
    add("--known", type=int, default=100)
    add("--model", default="smollm2")
    add("--lr", type=float, default=5e-4)
    args = parser.parse_args(argv)
    try:
        (cell,) = cells_of("S1", [args.cell], args.known)
    except ValueError:
        (cell,) = cells_of("N", [args.cell], args.known)
    if args.rows is not None:
        cell = {**cell, "rows": args.rows}
    job = {"cell": cell, "steps": 120, "batch": 16, **{name: getattr(args, name) for name in ("seed", "model", "lr")}}
    data, out = args.data.resolve(), args.out.resolve()
    if not any(line["job"] == job for line in read(out)):
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            line = compare(job, data)
        append(out, {"job": job, **line, "commit": commit(), "hardware": hardware()})
    print(report(read(out)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
