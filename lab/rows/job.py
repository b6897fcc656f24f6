"""One job in a process of its own: `python -m rows.job OUT DATA` reads it from stdin and adds a line to OUT.

A job "scores" trains once on a pool with planted errors, and scores its rows in every way. A job "drop" trains on the
same pool as it is, and then without the rows that a score names, against as many chosen otherwise. A job "peers"
scores it as other tools do. The lines of "scores" and "drop" hold the losses of rows and decoys, so that the report can
apply another rule without training.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lab.lines import work_off
from lab.pays.pool import Pool, asked, make_pool
from lab.rows.cells import demo_pool, plant, rows_in
from lab.rows.first_sight import LEAST
from lab.rows.metrics import all_of, named
from lab.rows.peers import Fold, classes_of, crossed
from lab.rows.scores import all_scores, scores_of
from lab.training import Work, load
from siftune.data.rows import rows_from
from siftune.data.target import SOURCE
from siftune.data.tokens import tokenize_rows
from siftune.evaluate.likelihood import row_nll
from siftune.models.attention import short_rows
from siftune.records.record import RowRecord
from siftune.suspects.losses import swapped_of
from siftune.suspects.rule import judge
from siftune.train.build import Built

Job = dict[str, Any]
Record = dict[str, Any]
Row = dict[str, Any]

ARMS = ("named", "first", "random", "truth")  # what is left out, but for the arm "all"


@dataclass
class Scored(Work):
    """Training that records its rows, and scores them under the final model.

    Attributes:
        questions: Whether to measure held-out rows, too.
    """

    questions: bool = False
    record: RowRecord = field(default_factory=RowRecord)
    final: Any = None
    swapped: dict[tuple[int, str], Any] = field(default_factory=dict)

    def _add_to(self, built: Built) -> None:
        built.trainer.add_callback(self.record)

    def _measure(self, model: nn.Module) -> Record:
        rows = rows_from([{**asked(row), SOURCE: _source(row)} for row in self.pool.train])
        self.swapped = swapped_of(rows, self.job["seed"])
        data = tokenize_rows([*rows, *self.swapped.values()], self.tokenizer, 512, "none")
        with short_rows():
            self.final = row_nll(model, list(zip(data["input_ids"], data["labels"], strict=True)), 64)
        return super()._measure(model) if self.questions else {}

    def scores(self) -> tuple[dict[str, Any], Record]:
        """Scores of all rows, each (R,), and what the line of the job holds of them."""
        rows = self.pool.train
        bad = np.array([row["bad"] for row in rows])
        kinds = np.unique([_source(row) for row in rows], return_inverse=True)[1]
        losses, swapped = np.split(self.final.nll, [len(rows)])
        found = dict(zip(self.swapped, swapped.round(2).tolist(), strict=True))
        decoys, elsewhere, decoys_elsewhere = (
            {str(at): nll for (at, what), nll in found.items() if what == kind}
            for kind in ("decoy", "row elsewhere", "decoy elsewhere")
        )
        verdict = judge(*scores_of(losses, kinds, decoys, elsewhere, decoys_elsewhere))
        scores = all_scores(self.record.visits(), losses, self.final.tokens[: len(rows)], verdict, kinds)
        old = scores.get("first-source", scores["first"])
        line = {
            "rows": len(rows),
            "bad": int(bad.sum()),
            "scores": {name: all_of(values, bad) for name, values in scores.items()} if bad.any() else {},
            "named_first": {**named(old, bad, LEAST), "of": int(bad.sum())},
            "losses": np.round(losses, 2).tolist(),
            "decoys": decoys,
            "elsewhere": elsewhere,
            "decoys_elsewhere": decoys_elsewhere,
            "wrong": np.flatnonzero(bad).tolist(),
            "kinds": kinds.tolist() if kinds.any() else 0,
        }
        scores["named"] = np.isin(np.arange(len(rows)), verdict.order[: verdict.count])
        return scores, line


def _source(row: Row) -> str:
    """The source of a row, which does not say whether it is wrong."""
    return "arithmetic" if row["group"] in ("target", "wrong", "arithmetic") else str(row["group"])


def pool_of(job: Job, data: Path, tokenizer: Any) -> Pool:
    """Draw the rows of a job, and plant its errors."""
    count = job.get("rows") or rows_in(job["cell"], job["steps"], job["batch"])
    if job["cell"]["kind"] == "demo":
        return demo_pool(count, job["seed"])

    def length(row: Row) -> int:
        return len(tokenizer("".join(asked(row).values()))["input_ids"]) + 1

    pool = make_pool({**job, "cell": {**job["cell"], "rows": count}}, data, length)
    return replace(pool, train=plant(pool.train, job["cell"], job["seed"]))


def scored(job: Job, data: Path, folder: Path) -> Record:
    """Train once, and score all rows."""
    model, tokenizer = load(job)
    work = Scored(job, model, tokenizer, pool_of(job, data, tokenizer), folder)
    measured = work.run()
    return {**work.scores()[1], "seconds_per_step": measured.get("seconds_per_step")}


def dropped(job: Job, data: Path, folder: Path) -> Record:
    """Train on all rows, and without the flagged rows; each arm has the same steps."""
    model, tokenizer = load(job)
    pool = pool_of(job, data, tokenizer)
    first = Scored(job, model, tokenizer, pool, folder, questions=True)
    arms = {"all": _quality(first.run())}
    scores, line = first.scores()
    bad = np.array([row["bad"] for row in pool.train])
    gone = leave_out(scores["named"], scores.get("first-source", scores["first"]), bad, job["seed"])
    for name in job.get("arms", ARMS):
        kept = [row for at, row in enumerate(pool.train) if at not in gone[name]]
        same = not gone[name]
        arms[name] = arms["all"] if same else _quality(Work(job, *load(job), replace(pool, train=kept), folder).run())
    counts = {name: {"rows": len(rows), "bad": int(bad[sorted(rows)].sum())} for name, rows in gone.items()}
    return {**line, "gone": counts, "arms": arms}


def compared(job: Job, data: Path, folder: Path) -> Record:
    """Train on half of the rows to score the other half, twice; both are the pool's, taken in turn."""
    half = {**job, "steps": job["steps"] // 2}
    model, tokenizer = load(job)
    pool = pool_of(job, data, tokenizer)
    halves = pool.train[::2], pool.train[1::2]
    classes = classes_of(Work(half, model, tokenizer, pool, folder).tokenized(pool.train))
    labels, probs = [None] * len(pool.train), [None] * len(pool.train)
    for own, others in (halves, halves[::-1]):
        kept = replace(pool, train=own)
        fold = Fold(half, *load(job), kept, folder, others=others, classes=classes)
        first = 1 if own is halves[0] else 0
        labels[first::2], probs[first::2] = fold.run()["labelled"]
    bad = np.array([row["bad"] for row in pool.train])
    scores = {name: all_of(values, bad) for name, values in crossed(labels, probs).items()}
    return {"rows": len(bad), "bad": int(bad.sum()), "scores": scores}


def leave_out(suspect: Any, first: Any, bad: Any, seed: int) -> dict[str, set[int]]:
    """Numbers of the rows to leave out in each arm: the suspects, those of siftune 0.1, and as many at random.

    Args:
        suspect: (R,) 1 for a suspect.
        first: (R,) the score of siftune 0.1.
        bad: (R,) whether a row is bad.
        seed: Of the job.
    """
    suspects = np.flatnonzero(suspect)
    drawn = np.random.default_rng(seed).permutation(len(bad))[: len(suspects)]
    chosen = {"named": suspects, "first": np.flatnonzero(first >= LEAST), "random": drawn, "truth": np.flatnonzero(bad)}
    return {name: set(map(int, rows)) for name, rows in chosen.items()}


def _quality(measured: Record) -> Record:
    return {name: measured[name] for name in ("right", "nll", "tokens", "dev_nats")}


RUN: dict[str, Callable[[Job, Path, Path], Record]] = {"scores": scored, "drop": dropped, "peers": compared}


def main(argv: list[str]) -> int:
    """Work off the job of standard input; return the exit code."""

    def run(job: Job, data: Path, folder: Path) -> tuple[Record, str]:
        started = time.monotonic()
        result = RUN[job["scenario"]](job, data, folder)
        seconds = round(time.monotonic() - started, 1)
        return {**result, "seconds": seconds}, f"{result['bad']} of {result['rows']} rows are bad"

    return work_off(argv, run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
