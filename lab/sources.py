"""Weights of files: a pool of four files, of which one may be wrong, of another task, or a copy.

    python -m lab.sources --data FOLDER --pools good,wrong,foreign,copy --seeds 0,1 --out FILE
    python -m lab.sources --report FILE

All files have correct rows of arithmetic, but for the last one in `wrong` (wrong numbers), `foreign` (options of ARC
and OpenBookQA) and `copy` (the rows of the first file). 100 further rows are known to be correct. They are not trained
on. Methods, all with the same number of steps:

    all      every row
    by hand  without the last file, where it is not good
    sifted   the rows that `siftune sift` selects by the known rows
    by file  of each file a random share: that which sifting selects of it, divided by the largest of these shares

A finished job adds a line of JSON to FILE, and one that is there already is not made again. Shapes: R rows.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab.lines import append, key, read
from lab.pays.measure import measure_rows, nats_per_token
from lab.pays.pool import asked, read_options, spoiled
from lab.seeds import seed_means
from siftune import sift
from siftune.base.environment import hardware, versions
from siftune.data.batches import Collator
from siftune.data.rows import rows_from
from siftune.data.tasks import arithmetic_rows
from siftune.data.tokens import tokenize_rows
from siftune.models.load import load_model
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.report.table import Table, markdown_table
from siftune.train.build import build

Row = dict[str, Any]
Job = dict[str, Any]
Line = dict[str, Any]

POOLS = ("good", "wrong", "foreign", "copy")
METHODS = ("all", "by hand", "sifted", "by file")
FILES = 4
QUESTIONS = 300  # held-out
KNOWN = 100


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing, or print the report; return the exit code."""
    args = _parse(argv)
    if args.report:
        print(report(read(args.report)))
        return 0
    torch.set_num_threads(1)
    done = {key(line["job"]) for line in read(args.out)}
    with tempfile.TemporaryDirectory(prefix="siftune-sources-") as scratch:
        for number, job in enumerate(job for job in _jobs(args) if key(job) not in done):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            line = {"job": job, **measure(job, args.data, folder, Path(scratch)), "hardware": hardware()}
            append(args.out, {**line, "versions": versions()})
            print(f"{job['pool']}, {job['method']}, seed {job['seed']}: {np.mean(line['right']):.1%}", flush=True)
    return 0


def files_of(job: Job, data: Path) -> tuple[list[list[Row]], list[Row], list[Row]]:
    """Draw the four files, the known rows, and held-out rows."""
    count, seed = job["rows"], job["seed"]
    rng = random.Random(f"sources {seed}")
    rows = arithmetic_rows(FILES * count + KNOWN + QUESTIONS, seed)
    files = [rows[place * count :][:count] for place in range(FILES)]
    rest = rows[FILES * count :]
    if job["pool"] == "wrong":
        files[-1] = [spoiled(row, False, rng) for row in files[-1]]
    elif job["pool"] == "foreign":
        texts = [row for name in ("ARC-Easy", "openbookqa") for row in read_options(data / f"{name}.train.json", name)]
        files[-1] = rng.sample([row for row in texts if len(row["prompt"]) <= 100], count)
    elif job["pool"] == "copy":
        files[-1] = files[0]
    return files, rest[:KNOWN], rest[KNOWN:]


def measure(job: Job, data: Path, folder: Path, shared: Path) -> Line:
    """Choose rows, train on them, and measure held-out rows.

    Args:
        job: The job.
        data: Folder of the commonsense suite.
        folder: For the training.
        shared: For what jobs of one pool and seed share: the sifted pool.
    """
    files, known, test = files_of(job, data)
    line: Line = {}
    rows = [asked(row) for file in files for row in file]
    method = job["method"]
    if method == "by hand":
        rows = rows[: (FILES - 1) * job["rows"]]
    elif method != "all":
        selected = _sifted(job, files, known, shared)
        shares = [
            float(np.isin(np.arange(job["rows"]) + place * job["rows"], selected).mean()) for place in range(FILES)
        ]
        line["shares"] = shares
        if method == "by file":
            selected = _drawn([share / max(shares) for share in shares], job["rows"], job["seed"])
        rows = [rows[number] for number in selected]
    usual = {"template": "none", "attention": "eager", "log_every": 1000, "train": "pool", "out": str(folder / "run")}
    own = {"model": job["model"], "lr": job["lr"], "seed": job["seed"], "steps": job["steps"], "batch_size": 16}
    recipe = resolve_recipe(Recipe(**usual, **own))
    model, tokenizer = load_model(job["model"])
    built = build(recipe, model, tokenizer, {"train": _tokens(rows, tokenizer)}, folder / "checkpoints")
    built.trainer.train()
    found = measure_rows(built.trainer.model, _tokens([asked(row) for row in test], tokenizer), Collator(0))
    built.release()
    return {**line, "rows": len(rows), **found}


def _tokens(rows: Sequence[Row], tokenizer: Any) -> Any:
    return tokenize_rows(rows_from(rows), tokenizer, 512, "none")


def _sifted(job: Job, files: Sequence[Sequence[Row]], known: Sequence[Row], shared: Path) -> Sequence[int]:
    """Numbers of the rows of all files that sifting selects."""
    folder = shared / f"{job['pool']}-{job['seed']}"
    folder.mkdir(exist_ok=True)
    for name, rows in (("known", known), *((f"file{place}", file) for place, file in enumerate(files))):
        text = "".join(json.dumps(asked(row)) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    pool = [folder / f"file{place}.jsonl" for place in range(len(files))]
    settings = {"model": job["model"], "template": "none", "seed": job["seed"], "out": str(folder / "sifted")}
    return sift(pool, folder / "known.jsonl", **settings).selected


def _drawn(shares: Sequence[float], rows: int, seed: int) -> list[int]:
    """Numbers of a share of each file, drawn at random."""
    rng = np.random.default_rng(seed)
    parts = [rng.permutation(rows)[: round(share * rows)] + place * rows for place, share in enumerate(shares)]
    return sorted(np.concatenate(parts).tolist())


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
    found = seed_means(values, [[1.0] * QUESTIONS for _ in paired]).difference(method, best)
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
