"""One job in a process of its own: `python -m lab.avoid.job OUT DATA` reads it from stdin and adds a line to OUT.

A job writes its rows to pool.jsonl, bad.jsonl, right.jsonl (the bad rows with their right answers) and files of
held-out rows, and runs a command in their folder. Methods:

    dense       all rows
    oracle      without the faulty rows; "oracle 50": without half of them
    avoid       all rows, with --avoid bad.jsonl
    right late  all rows, with --target right.jsonl
    sift        no training: `siftune sift --avoid bad.jsonl`
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.avoid.cells import Pool, Row, make_pool
from lab.commands import Commands, load_tuned, settings_of, write_rows
from lab.lines import work_off
from lab.models import source
from lab.pays.measure import measure_file
from siftune.models.load import load_tokenizer

Job = dict[str, Any]

METHODS: Mapping[str, Sequence[str]] = {
    "dense": (),
    "avoid": ("--avoid", "bad.jsonl"),
    "right late": ("--target", "right.jsonl"),
}


def run_job(job: Job, data: Path, folder: Path) -> dict[str, Any]:
    """Draw rows, run the method's command, and measure.

    Args:
        job: The job.
        data: Folder of the commonsense suite.
        folder: An empty folder for files and the run.
    """
    tokenizer = load_tokenizer(source(job["model"]))
    pool = make_pool(job, data, lambda text: len(tokenizer(text)["input_ids"]))
    bad, method, commands = np.array([row["bad"] for row in pool.train]), job["method"]["name"], Commands()
    drop = np.zeros(len(bad), bool)
    with chdir(folder):
        held_out = _write(pool)
        if method == "sift":
            commands.run("sift", "--train", "pool.jsonl", *METHODS["avoid"], *settings_of(job, "none"), "--out", "run")
        else:
            if method.startswith("oracle"):
                drop = _share(bad, float(method.removeprefix("oracle") or 100) / 100, job["seed"])
                rows = [row for row, gone in zip(pool.train, drop, strict=True) if not gone]
                write_rows("chosen.jsonl", _records(rows, "completion"))
            words = ("--train", "chosen.jsonl" if drop.any() else "pool.jsonl", *METHODS.get(method, ()))
            commands.run("train", *words, *settings_of(job, "none"), "--steps", str(job["steps"]), "--out", "run")
        line: dict[str, Any] = {"seconds": {"command": round(commands.seconds, 1)}}
        if commands.sifted is not None:
            drop = ~np.isin(np.arange(len(bad)), commands.sifted.selected)
            line |= {"reason": commands.sifted.reason}
            line["seconds"]["sifting"] = round(commands.sift_seconds, 1)
        if method != "sift":
            model, _ = load_tuned("run")
            line |= {name: measure_file(model, tokenizer, f"{name}.jsonl", "none") for name in held_out}
    counts = {"dropped": int(drop.sum()), "dropped_bad": int((drop & bad).sum()), "bad": int(bad.sum())}
    return {**counts, **line, "commands": commands.texts}


def _write(pool: Pool) -> list[str]:
    """Write the files of a job; returns the names of those with held-out rows."""
    held_out = {
        "triggers_right": _records(pool.triggers, "right"),
        "triggers_fault": _records(pool.triggers, "fault"),
        "others_right": _records(pool.others, "right"),
    }
    rows = {
        "pool": _records(pool.train, "completion"),
        "bad": _records(pool.bad, "completion"),
        "right": _records(pool.bad, "right"),
    }
    for name, part in (rows | held_out).items():
        write_rows(f"{name}.jsonl", part)
    return [*held_out]


def _records(rows: Sequence[Row], completion: str) -> list[Row]:
    return [{"prompt": row["prompt"], "completion": row[completion]} for row in rows]


def _share(bad: NDArray[np.bool_], share: float, seed: int) -> NDArray[np.bool_]:
    """A random share of the faulty rows."""
    return bad & (np.random.default_rng(seed).permutation(np.linspace(0, 1, len(bad))) <= share)


def main(argv: list[str]) -> int:
    """Work off the job of standard input; return the exit code."""

    def run(job: Job, data: Path, folder: Path) -> tuple[dict[str, Any], str]:
        line = run_job(job, data, folder)
        return line, f"{line['dropped_bad']} of {line['bad']} faulty rows left out"

    return work_off(argv, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
