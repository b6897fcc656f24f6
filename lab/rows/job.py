"""One job in a process of its own: `python -m lab.rows.job OUT DATA` reads it from stdin and adds a line to OUT.

A job writes its rows to pool.jsonl, and runs `siftune train` and `siftune rows` in their folder. The line holds the
recorded losses, so that the report can apply another rule without training. If the job trains for a number of passes,
it also holds the losses under the model that was trained on the rows; with none, the run has a single step, since
`siftune rows` only needs its settings.
"""

import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.commands import Commands, flags, load_tuned, settings_of, write_rows
from lab.lines import work_off
from lab.rows.cells import Row, rows_of
from siftune.data.decisions import read_decisions
from siftune.data.rows import rows_from
from siftune.data.tokens import tokenize_rows
from siftune.evaluate.likelihood import row_nll
from siftune.models.attention import short_rows
from siftune.suspects.losses import read_losses, trained_rows

Job = dict[str, Any]
Record = dict[str, Any]

LOSSES = ("loss", "other_loss", "usual", "other_usual")  # recorded columns of `siftune.suspects.losses.Losses`


def scored(job: Job, data: Path, folder: Path) -> Record:
    """Run the commands of a job, and compare."""
    rows, known = rows_of(job, data)
    commands = Commands()
    with chdir(folder):
        write_rows("pool.jsonl", [_plain(row) for row in rows])
        write_rows("few.jsonl", known)
        words = ["train", "--train", "pool.jsonl", *(["--target", "few.jsonl"] if known else [])]
        length = {"epochs": job["epochs"]} if job["epochs"] else {"steps": 1}
        commands.run(*words, *settings_of(job, "none"), *flags({"max-length": 1024, **length}), "--out", "run")
        before = commands.seconds
        commands.run("rows", "run", "--csv", "suspects.csv")
        every, about = trained_rows(Path("run"))
        losses = read_losses(Path("run/losses.parquet"), about, len(every))
        trained_on = _trained_on(rows) if job["epochs"] else None
        listed = read_decisions("suspects.csv").selected.values() if Path("suspects.csv").exists() else []
    return {
        "rows": len(rows),
        "wrong": [number for number, row in enumerate(rows) if row["bad"]],
        "listed": len(listed),
        "tokens": losses.tokens.tolist(),
        "covered": round(float(losses.covered.mean()), 3),
        "losses": {name: _rounded(getattr(losses, name)) for name in LOSSES},
        **({} if trained_on is None else {"trained_on": _rounded(trained_on)}),
        "commands": commands.texts,
        "processor_seconds": round(commands.seconds - before, 1),
    }


def _rounded(values: NDArray[np.floating]) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 2) for value in values]


def _plain(row: Row) -> Row:
    return {name: row[name] for name in ("prompt", "completion")}


def _trained_on(rows: list[Row]) -> NDArray[np.float64]:
    """Losses under the model that was trained on the rows, summed over label tokens."""
    model, tokenizer = load_tuned("run")
    data = tokenize_rows(rows_from([_plain(row) for row in rows]), tokenizer, 1024, "none")
    with short_rows():
        return row_nll(model, list(zip(data["input_ids"], data["labels"], strict=True)), 64).nll


def main(argv: list[str]) -> int:
    """Work off the job of standard input; return the exit code."""

    def run(job: Job, data: Path, folder: Path) -> tuple[Record, str]:
        result = scored(job, data.resolve(), folder)
        return result, f"{result['listed']} rows are listed; {len(result['wrong'])} are wrong"

    return work_off(argv, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
