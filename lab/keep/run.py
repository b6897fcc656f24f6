"""Forgetting: run the jobs of a cell, one process each, resumed by the same command.

    python -m lab.keep.run --data FOLDER --cells clean --methods untrained,dense,kl --seeds 0 --out keep.jsonl
    python -m lab.keep.report keep.jsonl

Cells are *clean* (scenario S5 of `lab.pays`) and *mix* (S1). A method is a name of METHODS, or
`NAME=METHOD,KEY:VALUE,...` with settings of the penalty: rows, weight, size, every, loss; or fields of a recipe.
"""

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.pays.cells import cells_of
from lab.pays.run import Queue, add_running, check_data, start

_LAB = Path(__file__).resolve().parents[1]
Job = dict[str, Any]

_SCENARIOS = {"clean": "S5", "mix": "S1", "reverse": "S1"}
_PENALTY = ("rows", "weight", "size", "every", "loss")

_KL: dict[str, Any] = {"penalty": {"rows": "own", "weight": 1.0, "size": 2, "every": 2}}
METHODS: dict[str, dict[str, Any]] = {
    "untrained": {"untrained": True},
    "dense": {"scales": True},
    "kl": _KL,
    "prompts": {"penalty": {**_KL["penalty"], "rows": "prompts"}},  # as `siftune train --keep own` has it
    "asft": {"penalty": {**_KL["penalty"], "rows": "task", "size": 16, "every": 1}},  # the divergence on task tokens
    "ewc": {"penalty": {**_KL["penalty"], "loss": "ewc", "size": 1}},
    "fixed": {"recipe": {"layers": [*range(3, 28)]}},  # of the 30 of SmolLM2
    "upper": {"recipe": {"layers": [*range(7, 30)]}},
    "fisher": {"gate": True},
    "fisher+kl": {"gate": True, **_KL},
    "oft": {"oft": True},
}


class Keeping(Queue):
    """The queue of these jobs."""

    module = "lab.keep.job"


def method_of(words: str) -> dict[str, Any]:
    """Read `kl`, or a variant `strong=kl,weight:4`.

    Raises:
        ValueError: There is no such method.
    """
    name, varies, options = words.partition("=")
    base, *changes = options.split(",") if varies else [name]
    if base not in METHODS:
        raise ValueError(f"unknown method {base!r}; use {', '.join(METHODS)}, or NAME=METHOD,KEY:VALUE,...")
    method = {"name": name, **copy.deepcopy(METHODS[base])}
    for change in changes:
        key, _, text = change.partition(":")
        try:
            value = json.loads(text)
        except ValueError:  # a word
            value = text
        method.setdefault("penalty" if key in _PENALTY else "recipe", {})[key] = value
    return method


def main(argv: list[str] | None = None) -> int:
    """Run what is missing; return the exit code."""
    args = _parse(argv)
    return start(args, _made(args), lambda _, data: check_data(data), Keeping)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cells", default="clean", help=", ".join(_SCENARIOS))
    add("--methods", nargs="+", default=["untrained", "dense", "kl"])
    add("--models", default="smollm2", help="smollm2, gemma3, qwen0.5b, qwen1.5b")
    add("--lrs", default="1e-3")
    add("--seeds", default="0")
    add("--steps", type=int, default=120)
    add("--batch", type=int, default=16)
    add_running(parser, "keep")
    return parser.parse_args(argv)


def _made(args: argparse.Namespace) -> Iterator[Job]:
    """Seed by seed, and within a seed cell by cell."""
    methods = [method_of(words) for given in args.methods for words in ([given] if "=" in given else given.split(","))]
    for seed in map(int, args.seeds.split(",")):
        for model in args.models.split(","):
            for name in args.cells.split(","):
                cell = cells_of(_SCENARIOS[name], [name])[0]
                for method in methods:
                    for lr in map(float, args.lrs.split(",")):
                        fixed = {"scenario": _SCENARIOS[name], "steps": args.steps, "batch": args.batch}
                        yield {**fixed, "cell": cell, "method": method, "model": model, "lr": lr, "seed": seed}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")
