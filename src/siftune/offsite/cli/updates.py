"""Table of the updates by a return, for `verify` and `plug`."""

from siftune.base.stages import text_console
from siftune.offsite.exchange.updates import UpdateReport
from siftune.report.table import Table, print_table

_MOVED = "‖W' − W‖ / ‖W‖"


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
