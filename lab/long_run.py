"""Does a long run stay as it began? Memory, open files and threads of `siftune train` as it goes on.

    python -m lab.long_run --steps 2000                              # a tiny random llama
    python -m lab.long_run --model smollm2 --steps 300 --methods gast

Every method trains in a process of its own, on rows of arithmetic in batches of four, with everything that a run has by
default: checkpoints, rows' losses, what was chosen. Linux alone, whose /proc tells what a process holds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lab.random_llama import save_llama
from siftune.data.tasks import arithmetic_rows
from siftune.report.table import Table, markdown_table

MOMENTS = (50, 0.25, 0.5, 0.75, 0.95)  # a step, then shares of the steps
Held = dict[str, int]  # "MB", "open files", "threads"


def watch(model: str, method: str, steps: list[int], folder: Path) -> list[Held]:
    """Train with a method in a process of its own; what that holds at each of these steps."""
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in arithmetic_rows(2000, seed=0)))
    words = [
        "train",
        "--model",
        model,
        "--train",
        rows,
        "--method",
        method,
        "--out",
        folder / "run",
        "--template",
        "none",
    ]
    words += ["--batch-size", 4, "--log-every", 5, "--steps", round(steps[-1] / MOMENTS[-1])]
    process = subprocess.Popen([sys.executable, "-m", "siftune", *map(str, words)], stderr=subprocess.DEVNULL)
    held: list[Held] = []
    while len(held) < len(steps):
        if process.poll() is not None:
            raise SystemExit(f"{method}: training ended with code {process.returncode} before step {steps[len(held)]}")
        if _step(folder / "run" / "metrics.jsonl") >= steps[len(held)]:
            held.append(_held(process.pid))
        time.sleep(0.05)
    if process.wait():
        raise SystemExit(f"{method}: training ended with code {process.returncode}")
    return held


def _step(metrics: Path) -> int:
    """The last step that a run has logged."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return next((step for line in reversed(lines) if (step := _number(line))), 0)


def _number(line: str) -> int:
    """The step of a line, which may be half written."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return 0


def _held(process: int) -> Held:
    """What a process holds now, from Linux' /proc."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return {
        "MB": int(status["VmRSS"].split()[0]) // 1000,
        "open files": len(os.listdir(f"/proc/{process}/fd")),
        "threads": int(status["Threads"]),
    }


def main() -> None:
    """Train with each method, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a tiny random llama if not given")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--methods", default="dense,ist,gast,lisa")
    options = parser.parse_args()
    steps = [min(options.steps, round(at if at > 1 else at * options.steps)) for at in MOMENTS]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or save_llama(Path(folder) / "llama", layers=4, hidden=32, longest=128)
        for method in options.methods.split(","):
            held = watch(model, method, steps, Path(folder) / method)
            for what in ("MB", "open files", "threads"):
                rows.append([method, what, *(f"{found[what]:,}" for found in held)])
    print(markdown_table(Table(["method", "", *(f"step {step}" for step in steps)], rows, words=(0, 1))))


if __name__ == "__main__":
    main()
