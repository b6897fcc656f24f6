"""Files of a pool: four, of which one may be wrong, of another task, or a copy.

    python -m lab.sources --data FOLDER --pools good,wrong,foreign,copy --seeds 0,1 --out FILE
    python -m lab.sources --report FILE

All files have correct rows of arithmetic, but for the last one in `wrong` (wrong numbers), `foreign` (options of ARC
and OpenBookQA) and `copy` (the rows of the first file). 100 further correct rows are the target of sifting, and are not
trained on. Methods, all with the same number of steps:

    all      every row
    by hand  without the last file, if it is not good
    sifted   the rows that `siftune sift` selects by the target

A job writes file0.jsonl to file3.jsonl, few.jsonl and test.jsonl, and runs siftune's commands in their folder. A
finished job adds a line of JSON to FILE, and one that is there already is not made again.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab.commands import Commands, load_tuned, settings_of, write_rows
from lab.lines import append, commit, key, read
from lab.pays.measure import measure_file, nats_per_token
from lab.pays.pool import asked, read_options, spoiled
from lab.seeds import seed_means
from siftune.base.environment import hardware, versions
from siftune.data.tasks import arithmetic_rows
from siftune.report.table import Table, markdown_table

Row = dict[str, Any]
Job = dict[str, Any]
Line = dict[str, Any]

POOLS = ("good", "wrong", "foreign", "copy")
METHODS = ("all", "by hand", "sifted")
FILES = 4
QUESTIONS = 300  # held-out
TARGET = 100


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, or print the report; return the exit code."""
    args = _parse(argv)
    if args.report:
        print(report(read(args.report)))
        return 0
    torch.set_num_threads(1)
    done, code = {key(line["job"]) for line in read(args.out)}, commit()
    for job in (job for job in _jobs(args) if key(job) not in done):
        with tempfile.TemporaryDirectory(prefix="siftune-sources-") as folder:
            line = {"job": job, **measure(job, args.data.resolve(), Path(folder)), "commit": code}
            append(args.out, {**line, "hardware": hardware(), "versions": versions()})
            print(f"{job['pool']}, {job['method']}, seed {job['seed']}: {np.mean(line['right']):.1%}", flush=True)
    return 0


def files_of(job: Job, data: Path) -> tuple[list[list[Row]], list[Row], list[Row]]:
    """Draw the four files, rows of the target, and held-out rows."""
    count, seed = job["rows"], job["seed"]
    rng = random.Random(f"sources {seed}")
    rows = arithmetic_rows(FILES * count + TARGET + QUESTIONS, seed)
    files = [rows[place * count :][:count] for place in range(FILES)]
    rest = rows[FILES * count :]
    if job["pool"] == "wrong":
        files[-1] = [spoiled(row, False, rng) for row in files[-1]]
    elif job["pool"] == "foreign":
        texts = [row for name in ("ARC-Easy", "openbookqa") for row in read_options(data / f"{name}.train.json", name)]
        files[-1] = rng.sample([row for row in texts if len(row["prompt"]) <= 100], count)
    elif job["pool"] == "copy":
        files[-1] = files[0]
    return files, rest[:TARGET], rest[TARGET:]


def measure(job: Job, data: Path, folder: Path) -> Line:
    """Choose rows, train on them, and measure held-out rows.

    Args:
        job: The job.
        data: Folder of the commonsense suite.
        folder: An empty folder for files and runs.
    """
    files, few, test = files_of(job, data)
    parts = {**{f"file{number}": rows for number, rows in enumerate(files)}, "few": few, "test": test}
    commands, line = Commands(), {"rows": FILES * job["rows"]}
    names = [f"file{number}.jsonl" for number in range(FILES)]
    settings = settings_of({**job, "batch": 16}, "none")
    with chdir(folder):
        for name, rows in parts.items():
            write_rows(f"{name}.jsonl", [asked(row) for row in rows])
        if job["method"] == "by hand":
            names, line["rows"] = names[:-1], (FILES - 1) * job["rows"]
        words = ["--train", *names]
        if job["method"] == "sifted":
            commands.run("sift", *words, "--target", "few.jsonl", *settings, "--out", "sifted")
            assert commands.sifted is not None
            selected = np.array(commands.sifted.selected)
            shares = np.bincount(selected // job["rows"], minlength=FILES) / job["rows"]
            line |= {"rows": len(selected), "shares": shares.tolist(), "reason": commands.sifted.reason}
            words += ["--drop-rows", "sifted/dropped.csv"] if commands.sifted.dropped else []
        commands.run("train", *words, *settings, "--steps", str(job["steps"]), "--out", "run")
        line |= measure_file(*load_tuned("run"), "test.jsonl", "none")
    return {**line, "commands": commands.texts}


def report(lines: Sequence[Line]) -> str:
    """Right answers and nats of each method, by pool; intervals over questions and seeds."""
    table = []
    for pool in dict.fromkeys(line["job"]["pool"] for line in lines):
        own = {(line["job"]["method"], line["job"]["seed"]): line for line in lines if line["job"]["pool"] == pool}
        best = "all" if pool == "good" else "by hand"
        for method in dict.fromkeys(name for name, _ in own):
            seeds = [seed for name, seed in own if name == method]
            parts = [own[method, seed] for seed in seeds]
            row = [pool, method, str(len(seeds)), f"{np.mean([part['rows'] for part in parts]):.0f}"]
            row.append(f"{100 * np.mean([np.mean(part['right']) for part in parts]):.1f}")
            row.append("" if method == best else _difference(own, method, best, seeds))
            row.append(f"{np.mean([nats_per_token(part) for part in parts]):.3f}")
            shares = [part["shares"] for part in parts if "shares" in part]
            row.append(", ".join(f"{100 * share:.0f}" for share in np.mean(shares, 0)) if shares else "")
            table.append(row)
    titles = ["pool", "method", "seeds", "rows", "correct, %", "− by hand", "nats", "selected of each file, %"]
    return markdown_table(Table(titles, table))


def _difference(own: Mapping[tuple[str, int], Line], method: str, best: str, seeds: Sequence[int]) -> str:
    paired = [seed for seed in seeds if (best, seed) in own]
    if not paired:
        return ""
    values = {
        name: [[100.0 * right for right in own[name, seed]["right"]] for seed in paired] for name in (method, best)
    }
    found = seed_means(values, [[1.0] * len(own[best, seed]["right"]) for seed in paired]).difference(method, best)
    return f"{found.value:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def _jobs(args: argparse.Namespace) -> Iterator[Job]:
    size = {"model": args.model, "rows": args.rows, "steps": args.steps, "lr": args.lr}
    for seed in map(int, args.seeds.split(",")):
        for pool in args.pools.split(","):
            for method in args.methods:
                if (pool, method) != ("good", "by hand"):  # the same as `all`
                    yield {"pool": pool, "method": method, "seed": seed, **size}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--report", type=Path, metavar="FILE")
    add("--data", type=Path, default=Path(), help="folder of the commonsense suite's files")
    add("--pools", default=",".join(POOLS))
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    add("--seeds", default="0")
    add("--model", default="smollm2")
    add("--rows", type=int, default=240, help="rows of each file")
    add("--steps", type=int, default=60)
    add("--lr", type=float, default=5e-4)
    add("--out", type=Path, default=Path(__file__).parent / "results" / "sources.jsonl")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
