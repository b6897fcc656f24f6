"""Scores of wrong rows: training on planted errors, one process per job, resumed by the same command.

    python -m lab.rows.run scores --data FOLDER --cells near-15,uniform-15 --seeds 0 --out rows.jsonl --workers 2
    python -m lab.rows.run scores --data FOLDER --cells demo-25 --lr 5e-4 --seeds 0,1,2 --out rows.jsonl
    python -m lab.rows.run scores --data FOLDER --cells uniform-0 --steps 16 --rows 400 --out rows.jsonl
    python -m lab.rows.run drop --data FOLDER --cells near-15,uniform-15 --seeds 0,1,2,3,4 --out rows.jsonl
    python -m lab.rows.run drop --data FOLDER --cells uniform-15 --arms named --seeds 0,1,2 --out rows.jsonl
    python -m lab.rows.run peers --data FOLDER --cells near-15 --out rows.jsonl  # needs cleanlab
    python -m lab.rows.report rows.jsonl

`rows/cells.py` defines the cells. Every job trains SmolLM2 or Gemma 3 with dense LoRA on siftune's own training
path: "scores" once, "drop" up to five times, "peers" twice on half of the rows. A finished job adds a line of JSON to
the file and is never made again; Ctrl-C loses only what is running. `--list` prints the jobs, one a line; `--jobs FILE`
runs those of a file, in its order.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.pays.run import Queue, add_running, check_data, start
from lab.rows.cells import KINDS, PERCENTS, cell_of

_LAB = Path(__file__).resolve().parents[1]
Job = dict[str, Any]
ALL = ",".join(f"{kind}-{percent}{way}" for way in ("", "-epochs") for kind in KINDS[:-1] for percent in PERCENTS)


class Rows(Queue):
    """The queue of these jobs."""

    module = "lab.rows.job"


def main(argv: list[str] | None = None) -> int:
    """Run what is missing; return the exit code."""
    args = _parse(argv)
    return start(args, _made(args), lambda _, data: check_data(data), Rows)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("scenario", nargs="?", default="scores", choices=["scores", "drop", "peers"])
    add("--cells", default=ALL, help="KIND-PERCENT or KIND-PERCENT-epochs, with commas between; all if not given")
    add("--models", default="smollm2", help="smollm2, gemma3, qwen0.5b, qwen1.5b")
    add("--lr", type=float, default=1e-3)
    add("--seeds", default="0")
    add("--steps", type=int, default=120)
    add("--batch", type=int, default=16)
    add("--arms", help="of drop, with commas between: named, first, random, truth; all if not given")
    add("--rows", type=int, help="rows of the pool; as many as the steps take in one pass if not given")
    add_running(parser, "rows")
    return parser.parse_args(argv)


def _made(args: argparse.Namespace) -> Iterator[Job]:
    """Seed by seed, and within a seed cell by cell."""
    cells = [cell_of(name) for name in args.cells.split(",")]
    fixed = {"scenario": args.scenario, "lr": args.lr, "steps": args.steps, "batch": args.batch}
    fixed |= {"rows": args.rows} if args.rows else {}
    fixed |= {"arms": args.arms.split(",")} if args.arms else {}
    for seed in map(int, args.seeds.split(",")):
        for model in args.models.split(","):
            for cell in cells:
                yield {**fixed, "cell": cell, "method": {"name": args.scenario}, "model": model, "seed": seed}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")
