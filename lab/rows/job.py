"""One job in a process of its own: `python -m lab.rows.job OUT DATA` reads it from stdin and adds a line to OUT.

A job writes its rows to pool.jsonl, runs `siftune train` and `siftune rows` in their folder, and compares the list, and
rival scores, with the rows that are wrong. If the job trains for a number of passes, the losses under the model that
was trained on the rows are a rival; with none, the run has a single step, since `siftune rows` only needs its settings.
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
from lab.rows.metrics import metrics_of
from siftune.data.rows import rows_from
from siftune.data.tokens import tokenize_rows
from siftune.evaluate.likelihood import row_nll
from siftune.models.attention import short_rows
from siftune.records.decisions import read_decisions
from siftune.suspects.losses import read_losses, trained_rows
from siftune.suspects.named import ScoredRows

Job = dict[str, Any]
Record = dict[str, Any]


def scored(job: Job, data: Path, folder: Path) -> Record:
    """Run the commands of a job, and compare."""
    rows, known = rows_of(job, data)
    bad = np.array([row["bad"] for row in rows])
    commands = Commands()
    with chdir(folder):
        write_rows("pool.jsonl", [_plain(row) for row in rows])
        write_rows("few.jsonl", known)
        words = ["train", "--train", "pool.jsonl", *(["--target", "few.jsonl"] if known else [])]
        length = {"epochs": job["epochs"]} if job["epochs"] else {"steps": 1}
        commands.run(*words, *settings_of(job, "none"), *flags({"max-length": 1024, **length}), "--out", "run")
        before = commands.seconds
        commands.run("rows", "run", "--csv", "suspects.csv")
        listed = ScoredRows(Path("run"))
        places = read_decisions("suspects.csv").selected if listed.suspects else {}
        chosen = np.array([f"{Path('pool.jsonl').resolve()}:{line}" in places for line in range(1, len(rows) + 1)])
        losses = read_losses(Path("run/losses.parquet"), trained_rows(Path("run"))[1])
        score = np.full(len(rows), np.nan)
        score[losses.row] = losses.loss - losses.other_loss
        scores = {"score": score, "loss": losses.loss, "per token": losses.loss / losses.tokens}
        if job["epochs"]:
            scores["loss, trained on"] = _trained_on(rows)
    return {
        "rows": len(rows),
        "bad": int(bad.sum()),
        "suspects": int(chosen.sum()),
        "suspects_bad": int(bad[chosen].sum()),
        "doubt": listed.doubt,
        "scores": {name: metrics_of(values, bad) for name, values in scores.items()} if bad.any() else {},
        "commands": commands.texts,
        "processor_seconds": round(commands.seconds - before, 1),
    }


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
        return (
            result,
            f"{result['suspects_bad']} of {result['suspects']} suspects are wrong, of {result['bad']} wrong rows",
        )

    return work_off(argv, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
