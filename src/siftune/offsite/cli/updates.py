"""Tables of the updates of returns, for `verify` and `plug`."""

from collections.abc import Sequence

from siftune.base.stages import text_console
from siftune.offsite.exchange.updates import Part, UpdateReport
from siftune.report.table import Table, print_table

_MOVED = "‖W' − W‖ / ‖W‖"


def show_returns(parts: Sequence[Part]) -> None:
    """Print what each of several returns had to do with the merged update."""
    if len(parts) < 2:
        return
    rows = []
    for part in parts:
        cosine = "none" if part.cosine is None else f"{part.cosine:.3f}"
        loss = "" if part.report.loss is None else f"{part.report.loss.after:.4f}"
        rows.append([part.name, _number(part.report.whole.relative), cosine, f"{part.weight:.3f}", loss])
    header = ["return", _MOVED, "cosine to the merged", "weight", "loss alone"]
    print_table(Table(header, rows), text_console())


def show_updates(report: UpdateReport) -> None:
    """Print by how much every layer moved, and the tensor in it that moved most."""
    rows = []
    for layer, update in report.layers.items():
        name = max(
            (name for name in report.tensors if name.startswith(f"{layer}.")),
            key=lambda name: report.tensors[name].relative or 0.0,
        )
        largest = report.tensors[name].relative
        rows.append([layer, _number(update.relative), _number(largest), name.removeprefix(f"{layer}.")])
    table = Table(["layer", _MOVED, "largest of a tensor", "tensor"], rows, words=(0, 3))
    print_table(table, text_console())


def _number(value: float | None) -> str:
    return "from zero" if value is None else f"{value:.2e}"
