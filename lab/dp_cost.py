"""Cost of differential privacy: siftune's private steps beside dense training and beside Opacus.

    python -m lab.dp_cost --out dp.jsonl

Every measurement is a fresh process that trains a LoRA on random tokens, and the methods take turns over the rounds, as
in `gast_cost.py`. All but `dense` train on the same drawn rows, in the same forward passes, on the same model, adapter
and loss, with the same optimizer; they differ in the clipping of rows:

    dense             `siftune train` without privacy: batches of one size
    dense-drawn       the drawn rows, neither clipped nor noised
    dp-flat           `siftune train --dp-epsilon`
    opacus            Opacus' GradSampleHooks and DPOptimizer: gradients of all rows for all layers are stored
    opacus-ghost      Opacus' ghost clipping: norms in a first backward pass, gradients in a second

Every private process holds Opacus in memory, since the accountant is Opacus'.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lab.gast_cost import Case, collect, pooled, table
from siftune.base.errors import RecipeError, SiftuneError
from siftune.bench.cost import Measurement, Workload, measure, parse_methods
from siftune.recipe.schema import Recipe

METHODS = ("dense", "dense-drawn", "dp-flat", "opacus", "opacus-ghost")
WORKER = (sys.executable, "-m", "lab.dp_cost", "--worker")


class PrivateWork(Workload):
    """The same workload with differential privacy."""

    def recipe(self, method: str, out: str) -> Recipe:
        """The recipe of a private run; the value of ε does not matter here."""
        plain = super().recipe("dense", out)
        return replace(plain, dp_epsilon=8.0, dp_delta=1e-6)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing and print the tables; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--worker"]:
        from siftune.bench import worker

        return worker.main(words[1:], build)
    args = _parse(words)
    try:
        methods = _methods(args.methods, args.dtype)
        case = _case(args)
        results = collect([case], methods, args.rounds, args.threads, args.out, measure_here)
    except SiftuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join([*table(results, methods[0]), "", *pooled(results, methods[0])]))
    return 0


def measure_here(method: str, number: int, work: Workload, threads: int | None, worker: Any) -> Measurement:
    """Measure a method in a fresh process of this script."""
    return measure(method, number, work, threads, worker=WORKER)


def build(method: str, work: Workload, folder: Path, *watchers: Any) -> Any:
    """Assemble a method's Trainer, as `worker.build_trainer` does."""
    from siftune.bench.worker import build_trainer

    if method == "dense":
        return build_trainer(method, work, folder, *watchers)
    from lab.dp_trainers import TRAINERS
    from siftune.methods.dp import callback
    from siftune.methods.dp.secret import Secret

    callback.Secret = lambda: Secret(work.seed)  # all draw the same rows
    private = PrivateWork(**asdict(work))
    trainer = build_trainer("dense", private, folder, *watchers)
    return trainer if method.startswith("dp-") else TRAINERS[method].take_over(trainer)


def _case(args: argparse.Namespace) -> Case:
    from siftune.models.source import resolve

    names: Mapping[str, Any] = {
        name: getattr(args, name) for name in ("dtype", "batch_size", "length", "steps", "warmup")
    }
    return Case(args.model, Workload(args.model, **names), str(resolve(args.model)))


def _methods(text: str, dtype: str) -> list[str]:
    names = parse_methods(text, METHODS)
    if dtype != "float32" and any(name.startswith("opacus") for name in names):
        raise RecipeError(
            f"the adapters of a {dtype} model are cast while they run, which Opacus' hooks do not see: give --dtype "
            "float32, or --methods without opacus and opacus-ghost"
        )
    return names


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    add = parser.add_argument
    add("--methods", default=",".join(METHODS), help="with commas between; the first is what others are compared with")
    add("--batch-size", type=int, default=16, help="rows in a step, on average")
    add("--length", type=int, default=128, help="tokens in a row")
    add("--steps", type=int, default=20, help="timed steps in a round")
    add("--warmup", type=int, default=2, help="steps before these")
    add("--rounds", type=int, default=5, help="times that each method is measured")
    add("--model", default="smollm2", help="folder, hub id, or smollm2 (packaged)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the frozen weights; opacus: float32")
    add("--threads", type=int, help="processor threads of each process; as in the environment if absent")
    add("--out", type=Path, help="file that finished measurements are added to, one line of JSON each")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
