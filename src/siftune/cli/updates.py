"""By how much a return moves the layers of a base model, for the terminal; `verify` and `plug` show it."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from siftune.offsite.protocol.updates import UpdateReport


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
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)


def _number(value: float | None) -> str:
    return "from zero" if value is None else f"{value:.2e}"
