"""What `siftune bench` measured: a table, and on what."""

from collections.abc import Mapping
from typing import Any

from siftune.report.table import Table


def cost_table(result: Mapping[str, Any]) -> Table:
    """Methods down: seconds, rounds and memory, and ratios to those that all are compared with; of what bench returns.

    Raises:
        KeyError, TypeError, ValueError: It is something else.
    """
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
    """What was measured, on what, and the floor; as `cost_table`."""
    work, floor = result["workload"], result["floor"]
    packages = ("torch", "transformers", "peft", "trl")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in packages if name in result["versions"])
    rounds = "one round" if result["rounds"] == 1 else f"medians of {result['rounds']} rounds"
    lines = [
        f"{rounds} of {work['steps']} steps; {work['model']} in {work['dtype']}, "
        f"{work['batch_size']} rows of {work['length']} tokens, LoRA of rank {work['rank']}",
        f"{result['hardware']}; {versions}",
    ]
    return [*lines, _floor_note(result["methods"], floor)] if floor else lines


def _floor_note(costs: Mapping[str, Any], floor: Mapping[str, float]) -> str:
    """The floor, and how far above it a dense step is."""
    tera = floor["flops"] / 1e12, floor["flops_per_second"] / 1e12
    note = f"matmul floor {floor['seconds']:.3g} s: {tera[0]:.3g} TFLOP in a dense step, at {tera[1]:.3g} TFLOP/s"
    if "dense" in costs:
        note += f"; dense = {costs['dense']['seconds_per_step'] / floor['seconds']:.1f} × the floor"
    return note
