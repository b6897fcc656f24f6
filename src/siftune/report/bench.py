"""The results of `siftune bench` as tables."""

from collections.abc import Mapping
from typing import Any

from siftune.report.table import Table


def cost_table(result: Mapping[str, Any]) -> Table:
    """Methods down: seconds, rounds and memory, and ratios to those that all are compared with."""
    costs = result["methods"]
    compared = list(dict.fromkeys(name for cost in costs.values() for name in cost["seconds_ratio"]))
    ratios = [f"× {name}" for name in compared]
    rows = [
        [
            method,
            f"{cost['seconds_per_step']:.3g}",
            f"{cost['fastest']:.3g}–{cost['slowest']:.3g}",
            *(f"{cost['seconds_ratio'][name]:.2f}" for name in compared),
            f"{cost['peak_memory_mb']:,.0f}",
            *(f"{cost['memory_ratio'][name]:.2f}" for name in compared),
        ]
        for method, cost in costs.items()
    ]
    return Table(["method", "s/step", "rounds", *ratios, "peak MB", *ratios], rows)


def notes(result: Mapping[str, Any]) -> list[str]:
    """Workload, hardware and versions."""
    work = result["workload"]
    packages = ("torch", "transformers", "peft", "trl")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in packages if name in result["versions"])
    rounds = "one round" if result["rounds"] == 1 else f"medians of {result['rounds']} rounds"
    return [
        f"{rounds} of {work['steps']} steps; {work['model']} in {work['dtype']}, "
        f"{work['batch_size']} rows of {work['length']} tokens, LoRA of rank {work['rank']}",
        f"{result['hardware']}; {versions}",
    ]
