"""`siftune plug`: put what a data owner returned into the base model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console
from tyro.conf import arg

if TYPE_CHECKING:
    from siftune.offsite.protocol.plug import UpdateReport


@dataclass
class Options:
    """Put a return into the model that its kit was made from, and save an ordinary model.

    The return must be for this kit and hold its tensors, no others, with finite numbers that did not move too far.
    """

    kit: Path
    """Folder of the kit that was handed out."""
    returned: Annotated[Path, arg(name="return")]
    """Folder of what came back."""
    out: Path
    """Folder of the tuned model; must be new or empty."""
    model: str = "smollm2"
    """Model that the kit was made from: a folder, a hub id, or smollm2."""
    public_key: Path | None = None
    """Your public key, a PEM file, to check that the kit is as you signed it."""
    max_update: float = 1.0
    """Largest ‖W' − W‖ / ‖W‖ of a matrix or a layer that is accepted; above 1 a matrix was replaced, not tuned."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the tuned model; auto: the base's own."""


def run(options: Options) -> dict[str, Any]:
    """Check, plug in, save."""
    from siftune.offsite.protocol.plug import plug

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status("checking the return"):
        result = plug(
            options.model,
            options.kit,
            options.returned,
            options.out,
            public_key=options.public_key,
            max_update=options.max_update,
            dtype=options.dtype,
        )
    show_updates(result.report)
    console.print(f"tuned model in {result.folder}, in {result.dtype}", markup=False)
    return {
        "model": result.folder,
        "dtype": result.dtype,
        "kit": result.kit.digest,
        "verified": result.kit.verified,
        **result.report.to_dict(),
    }


def show_updates(report: "UpdateReport") -> None:
    """Print by how much every layer moved, and the matrix in it that moved most."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    table.add_column("layer")
    table.add_column("‖W' − W‖ / ‖W‖", justify="right")
    table.add_column("largest of a matrix", justify="right")
    table.add_column("matrix")
    for layer, update in report.layers.items():
        name = max(
            (name for name in report.matrices if name.startswith(f"{layer}.")),
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
