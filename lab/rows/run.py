"""Suspect rows of pools whose wrong rows are known: one process per job, resumed by the same command.

    python -m lab.rows.run --data FOLDER --cells intents-a --known 100 --epochs 1 --out rows.jsonl
    python -m lab.rows.run --data FOLDER --cells mixed-25 --rows 920 --lr 1e-3 --out rows.jsonl
    python -m lab.rows.report rows.jsonl

`rows/cells.py` defines the cells. A finished job adds a line of JSON to the file and is never made again; Ctrl-C loses
only what is running. `--list` prints the jobs, one a line; `--jobs FILE` runs those of a file, in its order.
"""

import argparse
import sys
from typing import Any

from lab.pays.run import Queue, add_running, check_data, start

Job = dict[str, Any]


class Rows(Queue):
    """The queue of these jobs."""

    module = "lab.rows.job"


def main(argv: list[str] | None = None) -> int:
    """Run what is missing; return the exit code."""
    args = _parse(argv)
    fixed = {"scenario": "rows", "method": {"name": "rows"}, "lr": args.lr, "batch": args.batch, "epochs": args.epochs}
    jobs = (
        {**fixed, "cell": {"name": cell, "rows": args.rows, "known": args.known}, "model": model, "seed": seed}
        for seed in map(int, args.seeds.split(","))
        for model in args.models.split(",")
        for cell in args.cells.split(",")
    )
    return start(args, jobs, lambda _, data: check_data(data), Rows)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cells", default="intents-a,raters,mixed-25,uniform-15", help="with commas between")
    add("--models", default="smollm2", help="smollm2, gemma3, qwen0.5b, qwen1.5b")
    add("--known", type=int, default=0, help="correct rows that are the target of the training")
    add("--epochs", type=int, default=0, help="passes of the run, for losses under its model; 0: one step")
    add("--rows", type=int, default=1440, help="rows of the pool")
    add("--lr", type=float, default=5e-4)
    add("--seeds", default="0")
    add("--batch", type=int, default=16)
    add_running(parser, "rows")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")
