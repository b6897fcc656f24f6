"""Cost of row selection: siftune's engine beside dense training and two reference implementations.

    python -m lab.gast_cost --out cost.jsonl

Every measurement is a fresh process that trains on random tokens; the methods take turns over the rounds, as in
`siftune bench`. The table has medians over the rounds; ratios to the first method are formed within a round, and
followed by their range over the rounds.

With `--out`, every finished measurement adds a line of JSON to the file and is not repeated: an interrupted run
continues, and more methods or rounds can be added.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

from siftune.base.errors import DataError, RecipeError, SiftuneError
from siftune.bench.cost import MEASURED, Measurement, Workload, measure, parse_methods, schedule, summarise

# baseline -> its class in `baselines`, and the method of siftune's whose settings it has
BASELINES = {
    "two-pass": ("TwoPass", "gast-rest"),
    "two-pass-sample": ("TwoPass", "gast-sample"),
    "store-all": ("StoreAll", "gast-rest"),
    "store-all-sample": ("StoreAll", "gast-sample"),
}
METHODS = "dense,gast-rest,gast-sample,ist,ist+gast,two-pass,store-all"

WORKER = (sys.executable, "-m", "lab.gast_cost", "--worker")


@dataclass(frozen=True)
class Case:
    """A workload that the methods are compared on.

    Attributes:
        name: Its name in tables.
        work: The workload; its model is a description, the same in every run.
        model: Folder of the model.
    """

    name: str
    work: Workload
    model: str

    def key(self, threads: int | None) -> dict[str, Any]:
        """The conditions that comparable measurements share, in JSON's types."""
        key: dict[str, Any] = json.loads(json.dumps({**asdict(self.work), "threads": threads}))
        return key


def main(argv: list[str] | None = None) -> int:
    """Measure what is missing and print the table; return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["--worker"]:
        from siftune.bench import worker

        return worker.main(words[1:], build)
    args = _parse(words)
    try:
        methods = parse_methods(args.methods, [*MEASURED, *BASELINES])
        if args.out is not None and not os.access(args.out.parent, os.W_OK):
            raise RecipeError(f"--out {args.out} cannot be written: there is no folder {args.out.parent} to write to")
        results = collect([_case(args)], methods, args.rounds, args.threads, args.out)
    except SiftuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    lines = table(results, methods[0])
    print("\n".join([*lines, "", *pooled(results, methods[0])] if args.pooled else lines))
    return 0


def build(method: str, work: Workload, folder: Path, *watchers: Any) -> Any:
    """Assemble a method's Trainer, as `worker.build_trainer` does, also for the baselines."""
    from siftune.bench.worker import build_trainer

    if method not in BASELINES:
        return build_trainer(method, work, folder, *watchers)
    from lab import baselines

    kind, like = BASELINES[method]
    trainer = build_trainer("dense", work, folder, *watchers)
    settings = work.recipe(like, "unused").gast
    return baselines.BaselineTrainer.take_over(trainer, getattr(baselines, kind), settings, work.seed)


def collect(
    cases: Sequence[Case],
    methods: Sequence[str],
    rounds: int,
    threads: int | None,
    out: Path | None,
    measuring: Callable[..., Measurement] = measure,
) -> list[tuple[Case, list[Measurement]]]:
    """Take the missing measurements, round by round over all cases, and add them to `out`.

    Returns:
        The measurements of every case, earlier ones included.

    Raises:
        DataError: `out` holds no measurements, or those of another machine or of other versions.
    """
    held = _read(out)
    found: dict[str, dict[tuple[int, str], Measurement]] = {case.name: {} for case in cases}
    for number in range(rounds):
        for case in cases:
            for method in (name for place, name in schedule(methods, rounds) if place == number):
                key = case.key(threads)
                record = _find(held, key, method, number)
                if record is None:
                    print(f"round {number + 1} of {rounds}: {case.name}, {method}", file=sys.stderr)
                    here = replace(case.work, model=case.model)
                    record = {"workload": key, **asdict(measuring(method, number, here, threads, worker=WORKER))}
                    _refuse_mixture(held, record, out)
                    held.append(record)
                    if out is not None:
                        with out.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(record) + "\n")
                found[case.name][number, method] = _measurement(record)
    return [(case, list(found[case.name].values())) for case in cases]


def recorded(path: Path) -> list[tuple[Case, list[Measurement]]]:
    """The measurements of a file, by workload."""
    cases: dict[str, tuple[Case, list[Measurement]]] = {}
    for record in _read(path):
        values = {field.name: record["workload"][field.name] for field in fields(Workload)}
        work = Workload(**{**values, "targets": tuple(values["targets"])})
        case = cases.setdefault(json.dumps(record["workload"]), (Case(work.model, work, work.model), []))
        case[1].append(_measurement(record))
    return list(cases.values())


def table(results: Sequence[tuple[Case, list[Measurement]]], reference: str) -> list[str]:
    """Lines of a Markdown table of all cases, with notes on workload and machine."""
    heads = ["method", "s/step", f"× {reference}", "peak MB", f"× {reference}"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * 4}"]
    for _, measurements in results:
        for method, cost in summarise(measurements, [reference]).items():
            cells = [
                method,
                f"{cost.seconds_per_step:.3g}",
                _ratio(measurements, method, reference, lambda m: m.seconds_per_step),
                f"{cost.peak_memory_mb:,.0f}",
                _ratio(measurements, method, reference, lambda m: m.peak_memory_mb),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *_notes(results)]


def pooled(results: Sequence[tuple[Case, list[Measurement]]], reference: str) -> list[str]:
    """Lines of a Markdown table of medians over the single steps of all rounds, and of the ratios of these medians.

    If bursts of other work slow down a few steps, these are more robust than the mean of a round.
    """
    lines = [f"| case | method | median s/step | × {reference} |", "|---|---|---:|---:|"]
    for case, measurements in results:
        steps: dict[str, list[float]] = {}
        for measurement in measurements:
            steps.setdefault(measurement.method, []).extend(measurement.seconds)
        middle = {method: median(seconds) for method, seconds in steps.items()}
        lines += [
            f"| {case.name} | {m} | {value:.3g} | {value / middle[reference]:.2f} |" for m, value in middle.items()
        ]
    return lines


def _ratio(measurements: Sequence[Measurement], method: str, reference: str, of: Callable[[Measurement], float]) -> str:
    """Median and range over the rounds of a method's value over the reference's."""
    values = {(m.method, m.round): of(m) for m in measurements}
    ratios = [value / values[reference, number] for (name, number), value in values.items() if name == method]
    return f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def _notes(results: Sequence[tuple[Case, list[Measurement]]]) -> list[str]:
    work, measurements = results[0][0].work, results[0][1]
    rounds = len({m.round for m in measurements})
    facts = measurements[0].facts
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers", "peft", "siftune"))
    return [
        f"{rounds} round{'s' * (rounds > 1)} of {work.steps} steps after {work.warmup}; {work.model} in "
        f"{facts['dtype']}, {work.batch_size} rows of {work.length} tokens, {work.label_share:.0%} of the tokens "
        f"learned, LoRA of rank {work.rank} on {', '.join(work.targets)}.",
        f"{facts['hardware']}; {versions}.",
    ]


def _read(out: Path | None) -> list[dict[str, Any]]:
    """The measurements in a file; an incomplete last line is removed."""
    if out is None or not out.exists():
        return []
    text = out.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    try:
        records = [json.loads(line) for line in whole.splitlines()]
        strange = text and not all({"workload", "method", "round"} <= record.keys() for record in records or [{}])
    except (ValueError, AttributeError):
        strange = True
    if strange:
        raise DataError(f"{out} holds something else than lines of measurements; give another --out")
    if whole != text:
        out.write_text(whole, encoding="utf-8")
    return records


def _find(held: Sequence[dict[str, Any]], key: dict[str, Any], method: str, number: int) -> dict[str, Any] | None:
    return next((r for r in held if (r["method"], r["round"]) == (method, number) and r["workload"] == key), None)


def _refuse_mixture(held: Sequence[dict[str, Any]], record: dict[str, Any], out: Path | None) -> None:
    """Refuse to compare across machines or versions."""
    for name in ("hardware", "versions"):
        before = held[0]["facts"][name] if held else record["facts"][name]
        if before != record["facts"][name]:
            raise DataError(
                f"{out} was measured with {name} {before}, but here it is {record['facts'][name]}: the two cannot be "
                "compared; give another --out"
            )


def _measurement(record: dict[str, Any]) -> Measurement:
    return Measurement(
        record["method"], record["round"], tuple(record["seconds"]), record["peak_memory_mb"], record["facts"]
    )


def _parse(argv: list[str]) -> argparse.Namespace:
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    add = parser.add_argument
    known = ", ".join([*MEASURED, *BASELINES])
    add(
        "--methods",
        default=METHODS,
        help=f"with commas between; the first is what others are compared with. Known: {known}",
    )
    add("--batch-size", type=int, default=16, help="rows in a step")
    add("--length", type=int, default=128, help="tokens in a row")
    add("--steps", type=int, default=20, help="timed steps in a round; a multiple of 10 holds ist's share of scoring")
    add("--warmup", type=int, default=2, help="steps before these")
    add("--rounds", type=int, default=3, help="times that each method is measured")
    add("--model", default="smollm2", help="folder, hub id, or smollm2 (packaged)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="of the frozen weights")
    add("--threads", type=int, help="processor threads of each process; as in the environment if absent")
    add("--out", type=Path, help="file that finished measurements are added to, one line of JSON each")
    add("--pooled", action="store_true", help="add medians over the single steps of all rounds, for restless machines")
    return parser.parse_args(argv)


def _workload(args: argparse.Namespace, model: str) -> Workload:
    return Workload(
        model, args.dtype, batch_size=args.batch_size, length=args.length, steps=args.steps, warmup=args.warmup
    )


def _case(args: argparse.Namespace) -> Case:
    from siftune.models.source import resolve

    return Case(args.model, _workload(args, args.model), str(resolve(args.model)))


if __name__ == "__main__":
    sys.exit(main())
