"""`siftune bench`: time and memory of the methods, side by side on this machine."""

import json
import logging
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from siftune.base.errors import RecipeError
from siftune.base.files import write_beside
from siftune.base.settings import CONFIG, Count
from siftune.base.stages import text_console
from siftune.bench.cost import Measurement, Workload, measure, parse_methods, schedule, summarise

logger = logging.getLogger(__name__)


@dataclass(config=CONFIG)
class Options(Workload):
    """Measure the cost of a training step with each method on this machine: wall time and peak memory.

    Every method runs in a fresh process; the methods take turns over the rounds, on the same random tokens. Leave the
    machine idle meanwhile. Ratios carry over to similar machines, seconds do not.
    """

    methods: str = "dense,rst,ist,gast-rest"
    """Methods to measure, with commas between: those of siftune train (gast as gast-sample, gast-averaged with
    support rows drawn in every fourth step and averaged, or gast-rest), dense-compiled, dense-checkpointing,
    dense-dp, trl, trl-no-checkpointing."""
    against: str | None = None
    """Further methods to compare all with, such as trl: TRL's SFTTrainer with its own defaults."""
    rounds: Count = 3
    """Measurements of each method."""
    threads: Count | None = None
    """CPU threads of each process; as in the environment if not given."""
    out: Path | None = None
    """JSON file for the result and the time of every step."""


def run(options: Options) -> dict[str, Any]:
    """Measure, show the table, and return the figures."""
    from siftune.models.source import resolve
    from siftune.report.bench import cost_table, notes
    from siftune.report.table import print_table

    methods = parse_methods(options.methods)
    against = [] if options.against is None else parse_methods(options.against)
    compared = list(dict.fromkeys(["dense" if "dense" in methods else methods[0], *against]))
    methods = list(dict.fromkeys([*methods, *against]))
    out = None if options.out is None else options.out.expanduser()
    if out is not None and out.is_dir():
        raise RecipeError(f"--out {options.out} is a folder: give a file in it")
    if out is not None and not os.access(out.parent, os.W_OK):
        raise RecipeError(f"--out {options.out} cannot be written: {out.parent} is no folder to write to")
    if "ist" in methods and options.steps % options.interval:
        logger.warning(
            "--steps %d is no multiple of --interval %d: ist's scoring has more or less than its usual share",
            options.steps,
            options.interval,
        )
    work = Workload(**{field.name: getattr(options, field.name) for field in fields(Workload)})
    here = replace(work, model=str(resolve(work.model)))

    console = text_console(stderr=True)
    measurements: list[Measurement] = []
    versions: dict[str, str] = {}
    with console.status("") as status:
        for number, method in schedule(methods, options.rounds):
            now = f"round {number + 1} of {options.rounds}"
            status.update(f"{now}: measuring {method}")
            measurements.append(one := measure(method, number, here, options.threads))
            versions |= one.facts["versions"]
            figures = f"{one.seconds_per_step:.3g} s/step, peak {one.peak_memory_mb:,.0f} MB"
            console.print(f"{now}: {method} {figures}", markup=False)

    costs = summarise(measurements, compared)
    result = {
        "workload": {**asdict(work), "dtype": measurements[0].facts["dtype"]},
        "rounds": options.rounds,
        "hardware": measurements[0].facts["hardware"],
        "versions": versions,
        "methods": {method: asdict(cost) for method, cost in costs.items()},
    }
    output = text_console()
    print_table(cost_table(result), output)
    for line in notes(result):
        output.print(line, markup=False)
    if out is not None:
        taken = [{name: value for name, value in asdict(each).items() if name != "facts"} for each in measurements]
        text = json.dumps({**result, "measurements": taken}, indent=2)
        with write_beside(out) as [beside]:
            beside.write_text(text + "\n", encoding="utf-8")
    return result
