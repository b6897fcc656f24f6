"""One job in a process of its own: `python -m rows.job OUT DATA` reads it from stdin and adds a line to OUT.

A job "scores" trains once on a pool with planted errors, and scores its rows in every way. A job "drop" trains on the
same pool as it is, and then without the rows that a score names, against as many chosen otherwise. A job "peers"
scores it as other tools do.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lab.lines import append
from lab.pays.gemma import folder as gemma_folder
from lab.pays.job import Work
from lab.pays.measure import measure_rows, nats_per_token
from lab.pays.pool import Pool, asked, make_pool
from lab.pays.subset import SubsetTrainer
from lab.rows.cells import plant, rows_in
from lab.rows.metrics import all_of, named
from lab.rows.peers import Fold, classes_of, crossed
from lab.rows.scores import all_scores
from lab.rows.watch import Watch
from siftune.base.environment import hardware, versions
from siftune.base.errors import SiftuneError
from siftune.models.load import load_model
from siftune.records.record import RowRecord
from siftune.records.rows import Text
from siftune.records.scores import by_row, seen
from siftune.suspects.named import LEAST
from siftune.train.build import Built

Job = dict[str, Any]
Record = dict[str, Any]
Row = dict[str, Any]

ARMS = ("named", "loss", "random", "truth")  # what is left out, but for the arm "all"


@dataclass
class Recorded(Work):
    """Training that records its rows and, with `watch`, their gradients."""

    watch: Watch | None = None
    record: RowRecord = field(default_factory=RowRecord)

    def _take_over(self, built: Built, rows: Sequence[Row]) -> SubsetTrainer:
        trainer = super()._take_over(built, rows)
        for part in (self.record, self.watch):
            if part is not None:
                trainer.add_callback(part)
        return trainer


def pool_of(job: Job, data: Path, tokenizer: Any) -> Pool:
    """Draw the rows of a job, and plant its errors."""
    cell = {**job["cell"], "rows": rows_in(job["cell"], job["steps"], job["batch"])}

    def length(row: Row) -> int:
        return len(tokenizer("".join(asked(row).values()))["input_ids"]) + 1

    pool = make_pool({**job, "cell": cell}, data, length)
    return replace(pool, train=plant(pool.train, job["cell"], job["seed"]))


def scored(job: Job, data: Path, folder: Path) -> Record:
    """Train once, and score all rows."""
    model, tokenizer = load(job)
    pool = pool_of(job, data, tokenizer)
    work = Recorded(job, model, tokenizer, pool, folder, watch=Watch())
    base = measure_rows(model, work.tokenized(pool.train), work.collate)
    measured = work.run()
    texts = [Text(row["prompt"], row["completion"]) for row in pool.train]
    before = np.array(base["nll"]) / np.array(base["tokens"])
    sources = np.array([row["group"] == "options" for row in pool.train]) if job["cell"]["kind"] == "mixed" else None
    scores = all_scores(work.record.visits(), work.watch.columns(), before, texts, sources)
    bad = np.array([row["bad"] for row in pool.train])[np.unique(work.record.visits().row)]
    return {
        "rows": len(bad),
        "bad": int(bad.sum()),
        "scores": {name: all_of(values, bad) for name, values in scores.items()},
        "named": named(scores["row"], bad, LEAST),
        **({"named_by_source": named(scores["source"], bad, LEAST)} if "source" in scores else {}),
        "nats": round(nats_per_token(measured), 5),
        "seconds_per_step": measured.get("seconds_per_step"),
    }


def dropped(job: Job, data: Path, folder: Path) -> Record:
    """Train on all rows, and without the flagged rows; each arm has the same steps."""
    model, tokenizer = load(job)
    pool = pool_of(job, data, tokenizer)
    first = Recorded(job, model, tokenizer, pool, folder)
    arms = {"all": _quality(first.run())}
    visits = first.record.visits()
    score, loss = _scores(visits, len(pool.train))
    bad = np.array([row["bad"] for row in pool.train])
    gone = leave_out(score, loss, bad, job["seed"])
    for name in ARMS:
        kept = [row for at, row in enumerate(pool.train) if at not in gone[name]]
        arms[name] = _quality(Work(job, *load(job), replace(pool, train=kept), folder).run())
    counts = {name: {"rows": len(rows), "bad": int(bad[sorted(rows)].sum())} for name, rows in gone.items()}
    return {"rows": len(bad), "bad": int(bad.sum()), "gone": counts, "arms": arms}


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


def leave_out(score: Any, loss: Any, bad: Any, seed: int) -> dict[str, set[int]]:
    """Numbers of the rows to leave out in each arm: the flagged rows, and as many by loss and at random.

    Args:
        score: (R,) siftune's.
        loss: (R,) the loss at first sight.
        bad: (R,) whether a row is bad.
        seed: Of the job.
    """
    named_rows = np.flatnonzero(score >= LEAST)
    count = len(named_rows)
    drawn = np.random.default_rng(seed).permutation(len(score))[:count]
    chosen = {"named": named_rows, "loss": np.argsort(-loss, kind="stable")[:count], "random": drawn}
    return {name: set(map(int, rows)) for name, rows in {**chosen, "truth": np.flatnonzero(bad)}.items()}


def _scores(visits: Any, count: int) -> tuple[Any, Any]:
    """Score of every row, and its loss at first sight; a row that was never seen is not named."""
    gathered = seen(visits.row)
    both = np.full((2, count), -np.inf)
    both[:, gathered.rows] = by_row(visits.row, visits.loss, visits.step), visits.loss[gathered.first]
    return both[0], both[1]


def _quality(measured: Record) -> Record:
    return {name: measured[name] for name in ("right", "nll", "tokens", "dev_nats")}


def load(job: Job) -> tuple[Any, Any]:
    """The model of a job, fresh."""
    return load_model(str(gemma_folder()) if job["model"] == "gemma3" else job["model"])


RUN: dict[str, Callable[[Job, Path, Path], Record]] = {"scores": scored, "drop": dropped, "peers": compared}


def main(argv: list[str]) -> int:
    """Work off the job of standard input; return the exit code."""
    job, started = json.loads(sys.stdin.read()), time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = RUN[job["scenario"]](job, Path(argv[1]), Path(folder))
    except SiftuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    seconds = round(time.monotonic() - started, 1)
    append(Path(argv[0]), {"job": job, **found, "seconds": seconds, "hardware": hardware(), "versions": versions()})
    print(f"{found['bad']} of {found['rows']} rows are bad")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
