"""Quality of selection: run the jobs of a scenario or of a file, several at a time.

    python -m lab.pays.run S1 --data FOLDER --cells mix,reverse --methods few,dense,target,sifted,oracle \
        --lrs 5e-4,1e-3 --seeds 0,1 --out pays.jsonl --workers 2
    python -m lab.pays.run --data FOLDER --jobs jobs.jsonl --out pays.jsonl
    python -m lab.pays.report pays.jsonl

Each job (cell, method, model, learning rate, seed) runs siftune's commands on files of rows, in a fresh process with
one thread, and is measured on held-out rows. A finished job adds a line of JSON to the file, and is never made again;
Ctrl-C loses only what is running. Seed 0 of all cells comes first, so that a run cut short compares what it has.
`--list` prints the jobs, one a line: the file that `--jobs` takes, in whose order they are run.

Scenarios:
    S1  a target in a pool: cells mix and reverse, and TASK-SHARE or TASK-SHARE-wrong of real text, such as boolq-25
    S2  wrong labels, nothing known: uniform-15 to near-45, in one pass; with -400 after it, 400 rows passed over often
    S3  learning rates: mix, reverse, clean
    S5  layers and privacy: clean arithmetic, options of ARC and OpenBookQA by text (clean-options) and by letter
        (clean-letters), and BoolQ (clean-boolq)
    N   errors of people, programs and models: raters, intents-a, tasks-slots and the others of natural.py
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_LAB = Path(__file__).resolve().parents[1]

Job = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run what is missing; return the exit code."""
    args = _parse(argv)
    return start(args, _of_scenario(args), check, Queue)


def start(
    args: argparse.Namespace,
    made: Iterator[Job],
    check: Callable[[list[Job], Path], None],
    queue: "type[Queue]",
) -> int:
    """List jobs, or run those that are missing; return the exit code.

    Args:
        args: Of a runner's command line: `jobs`, `list`, `data`, `out`, `workers`.
        made: The jobs that the command line asks for, where it names no file of them.
        check: Refuses jobs and data that cannot be used.
        queue: What runs them.
    """
    try:
        jobs = list(from_file(args.jobs) if args.jobs else made)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if args.list:
        print("\n".join(json.dumps(job) for job in jobs))
        return 0
    check(jobs, args.data)
    return 1 if queue(jobs, args.out, args.data).work(args.workers) else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("scenario", nargs="?", default="S1", help="S1, S2, S3, S5 or N")
    add("--cells", default="mix,reverse")
    add("--known", default="", help="numbers of known rows, such as 8,100; the scenario's own if not given")
    add("--methods", nargs="+", default=["dense"], help="names, or NAME=METHOD,KEY:VALUE,...; see methods.py")
    add("--models", default="smollm2", help="smollm2, gemma3, qwen0.5b, qwen1.5b: see lab.models")
    add("--lrs", default="5e-4")
    add("--seeds", default="0")
    add("--steps", type=int, default=120)
    add("--batch", type=int, default=16)
    add("--rows", type=int, help="rows of a pool; those of the cell if not given")
    add_running(parser, "pays")
    return parser.parse_args(argv)


def add_running(parser: argparse.ArgumentParser, name: str) -> None:
    """Add what every runner takes: jobs, data, results, by default results/NAME.jsonl, and workers."""
    add = parser.add_argument
    add("--jobs", type=Path, metavar="FILE", help="run the jobs of this file, in its order")
    add("--list", action="store_true", help="print the jobs, and run nothing")
    add("--data", type=Path, default=Path(), help="folder of the commonsense suite's files")
    add("--out", type=Path, default=_LAB / "results" / f"{name}.jsonl")
    add("--workers", type=int, default=1)


def from_file(path: Path) -> Iterator[Job]:
    """Read jobs, one a line, as `--list` prints them."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; --list prints jobs for such a file")
    for text in path.read_text(encoding="utf-8").splitlines():
        if text.strip():
            yield json.loads(text)


def _of_scenario(args: argparse.Namespace) -> Iterator[Job]:
    """Seed by seed, and within a seed cell by cell."""
    from lab.pays.cells import cells_of
    from lab.pays.methods import method_of

    methods = [method_of(words) for given in args.methods for words in _names(given)]
    numbers = [int(number) for number in args.known.split(",")] if args.known else [None]
    cells = [cell for known in numbers for cell in cells_of(args.scenario, args.cells.split(","), known)]
    if args.rows is not None:
        cells = [{**cell, "rows": args.rows} for cell in cells]
    rates = [float(rate) for rate in args.lrs.split(",")]
    models = args.models.split(",")
    for seed in map(int, args.seeds.split(",")):
        for model, cell, method, lr in ((m, c, x, r) for m in models for c in cells for x in methods for r in rates):
            size = {"steps": args.steps, "batch": args.batch}
            yield {
                "scenario": args.scenario,
                "cell": cell,
                "method": method,
                "model": model,
                "lr": lr,
                "seed": seed,
                **size,
            }


def _names(words: str) -> list[str]:
    """Read `dense,gast`; a variant with its options is one."""
    return [words] if "=" in words else words.split(",")


def check_data(data: Path) -> None:
    """Refuse a folder that is not that of the commonsense suite."""
    if not (data / "ARC-Easy.test.json").is_file():
        raise SystemExit(f"{data} has no ARC-Easy.test.json; give the folder of the commonsense suite with --data")


def check(jobs: list[Job], data: Path) -> None:
    """Check commands and data before hours of training."""
    from lab.pays.job import words_of
    from siftune.base.errors import RecipeError, SiftuneError
    from siftune.cli.options import parse
    from siftune.cli.train import Options
    from siftune.recipe.checks import check as check_recipe

    check_data(data)
    try:
        for job in jobs:
            _, *words = words_of(job)
            check_recipe(parse(Options, words, "siftune train"))
            if "few.jsonl" in words and not job["cell"]["known"]:
                raise RecipeError("the method needs rows of the target: give a cell with some, or --known")
    except SiftuneError as error:
        raise SystemExit(f"{job['method']['name']}: {error}") from None


class Queue:
    """Jobs that are to be run, and what is running.

    Args:
        jobs: In their order; those that are in `out` are left out.
        out: File of the results.
        data: Folder of the commonsense suite.
    """

    module = "lab.pays.job"  # what works off a job in its own process

    def __init__(self, jobs: list[Job], out: Path, data: Path) -> None:
        self._jobs, self._out, self._data = jobs, out.resolve(), data.resolve()
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def work(self, workers: int) -> list[Job]:
        """Run the jobs; return those that failed."""
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(self._run, job) for job in self._jobs]
            try:
                done = [future.result() for future in futures]
            except BaseException:
                self._stop()
                raise
        failed = [job for job, good in zip(self._jobs, done, strict=True) if not good]
        for job in failed:
            print(f"failed: {describe(job)}", file=sys.stderr)
        return failed

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def _run(self, job: Job) -> bool:
        """Run one job in a process of its own; True if it is done."""
        if self._stopped or self._is_done(job):
            return not self._stopped
        started = time.monotonic()
        process = self._start()
        output, _ = process.communicate(json.dumps(job))
        with self._lock:
            self._running.discard(process)
        words = output.strip().splitlines()[-1] if output.strip() else f"exit code {process.returncode}"
        clock = time.strftime("%H:%M:%S")
        print(f"{clock} {describe(job)}: {words} in {time.monotonic() - started:.0f} s", flush=True)
        return process.returncode == 0

    def _is_done(self, job: Job) -> bool:
        """Whether a job is in the file by now; another runner may be at work on it."""
        from lab.lines import key, read

        return key(job) in {key(line["job"]) for line in read(self._out)}

    def _start(self) -> "subprocess.Popen[str]":
        path = os.pathsep.join([str(_LAB.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        command = [sys.executable, "-m", self.module, str(self._out), str(self._data)]
        with self._lock:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            process = subprocess.Popen(command, env=environment, **pipes)
            self._running.add(process)
        return process


def describe(job: Job) -> str:
    """One-line description of a job."""
    cell = job["cell"]
    parts = (job["scenario"], cell["name"], f"known {cell['known']}", job["method"]["name"], job["model"])
    return f"{' '.join(parts)} lr {job['lr']:g} seed {job['seed']}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")
