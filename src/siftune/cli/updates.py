"""By how much returns move the layers of a base model, for the terminal; `verify` and `plug` show it."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from siftune.offsite.protocol.updates import Part, UpdateReport


def show_returns(parts: Sequence[Part]) -> None:
    """Print what each of several returns had to do with the merged update."""
    if len(parts) < 2:
        return
    table = Table(box=SIMPLE_HEAD)
    table.add_column("return", overflow="fold")
    for name in ("‖W' − W‖ / ‖W‖", "cosine to the merged", "weight", "scaled by", "loss alone"):
        table.add_column(name, justify="right")
    for part in parts:
        cosine = "none" if part.cosine is None else f"{part.cosine:.3f}"
        clipped = "" if part.factor == 1 else f"{part.factor:.3f}, clipped"
        loss = "" if part.report.loss is None else f"{part.report.loss.after:.4f}"
        table.add_row(part.name, _number(part.report.whole.relative), cosine, f"{part.weight:.3f}", clipped, loss)
    _print(table)


def show_updates(report: UpdateReport) -> None:
    """Print by how much every layer moved, and the tensor in it that moved most."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("layer")
    table.add_column("‖W' − W‖ / ‖W‖", justify="right")
    table.add_column("largest of a tensor", justify="right")
    table.add_column("tensor")
    for layer, update in report.layers.items():
        name = max(
            (name for name in report.tensors if name.startswith(f"{layer}.")),
            key=lambda name: report.tensors[name].relative or 0.0,
        )
        table.add_row(
            layer, _number(update.relative), _number(report.tensors[name].relative), name.removeprefix(f"{layer}.")
        )
    _print(table)


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)


def _number(value: float | None) -> str:
    return "from zero" if value is None else f"{value:.2e}"
