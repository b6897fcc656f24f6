"""Rows that teach a fault: run the jobs, one process each, resumed by the same command.

    python -m lab.avoid.run --data FOLDER --cells carry-30 --methods dense oracle avoid "right late" --out avoid.jsonl
    python -m lab.avoid.report avoid.jsonl

`avoid/cells.py` defines the cells, and `avoid/job.py` the methods. A finished job adds a line of JSON to the file and
is never made again.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.avoid.cells import cell_of
from lab.pays.run import Queue, add_running, check_data, start

_LAB = Path(__file__).resolve().parents[1]
Job = dict[str, Any]


class Avoided(Queue):
    """The queue of these jobs."""

    module = "lab.avoid.job"


def main(argv: list[str] | None = None) -> int:
    """Run what is missing; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cells", default="carry-30", help="FAULT-PERCENT, with commas between")
    add("--methods", nargs="+", default=["dense", "avoid"], help="dense, oracle, avoid, right late, sift")
    add("--bad", default="32", help="numbers of bad rows, with commas between")
    add("--models", default="smollm2", help="smollm2, gemma3, qwen0.5b, qwen1.5b: see lab.models")
    add("--lr", type=float, default=5e-4)
    add("--seeds", default="0")
    add("--rows", type=int, default=960)
    add("--steps", type=int, default=60)
    add("--batch", type=int, default=16)
    add_running(parser, "avoid")
    args = parser.parse_args(argv)
    return start(args, _jobs(args), lambda _, data: check_data(data), Avoided)


def _jobs(args: argparse.Namespace) -> Iterator[Job]:
    cells = [cell_of(name, int(bad)) for name in args.cells.split(",") for bad in args.bad.split(",")]
    size = {name: getattr(args, name) for name in ("lr", "rows", "steps", "batch")}
    for seed in map(int, args.seeds.split(",")):
        for model in args.models.split(","):
            for cell in cells:
                for name in args.methods:
                    yield {
                        "scenario": "avoid",
                        "cell": cell,
                        "method": {"name": name},
                        "model": model,
                        "seed": seed,
                        **size,
                    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")
