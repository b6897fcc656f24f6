"""`siftune plug`: put what a data owner returned into the base model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import arg


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
    from siftune.cli.updates import show_updates
    from siftune.offsite.kit.folder import read_kit
    from siftune.offsite.protocol.plug import plug

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status("checking the return"):
        result = plug(
            options.model,
            read_kit(options.kit, options.public_key),
            options.returned,
            options.out,
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
