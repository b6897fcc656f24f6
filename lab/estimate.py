"""Accuracy of `siftune train --dry-run`: estimated and actual time and peak memory, method by method.

    python -m lab.estimate --train rows.jsonl --methods dense,ist,gast --rows 320

For each method, it estimates and then runs the training, each in a separate process, and prints a line of JSON. It
measures wall time and CPU time. Other work on the machine affects CPU time less, so that is estimated as well.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

from rich.console import Console

from siftune.recipe.schema import Recipe
from siftune.train import dry_run as trial
from siftune.train import run
from siftune.train.dry_run import dry_run
from siftune.train.trainer import SiftTrainer

_CLOCKS = {"clock": time.perf_counter, "processor": time.process_time}


def one(task: str, recipe: Recipe) -> dict[str, float]:
    """Estimate a run, or run it; seconds and peak memory in MB."""
    console = Console(quiet=True)
    if task in _CLOCKS:
        trial.time.perf_counter = _CLOCKS[task]  # in a process of its own
        found = dry_run(recipe, console).estimate
        return {"seconds": found.seconds or 0.0, "memory_mb": found.memory_mb or 0.0}
    spent: list[float] = []
    train = SiftTrainer.train

    def timed(self: SiftTrainer, *given: Any, **named: Any) -> Any:
        before = time.process_time()
        output = train(self, *given, **named)
        spent.append(time.process_time() - before)
        return output

    SiftTrainer.train = timed
    summary = run.train(recipe, console).summary
    return {"seconds": summary["seconds"], "processor": spent[0], "memory_mb": summary["peak_memory_mb"]}


def main(argv: list[str] | None = None) -> None:
    """Compare, or do one task of a comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--methods", default="dense,ist,gast")
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task", choices=[*_CLOCKS, "run"])
    options = parser.parse_args(argv)
    shared = ["--train", options.train, "--model", options.model, "--rows", str(options.rows)]
    for method in options.methods.split(","):
        if options.task:
            with tempfile.TemporaryDirectory() as folder:
                rows = {"train": options.train, "limit": options.rows, "eval_share": 0.05}
                recipe = Recipe(model=options.model, method=method, out=f"{folder}/run", **rows)
                print(json.dumps(one(options.task, recipe)))
            continue
        figures: dict[str, Any] = {"method": method}
        for task in ("clock", "processor", "run"):
            command = [sys.executable, "-m", "lab.estimate", *shared, "--methods", method, "--task", task]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            figures[task] = json.loads(done.stdout.splitlines()[-1])
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
