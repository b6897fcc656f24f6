"""`siftune plug`: put what a data owner returned into the base model."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import arg

from siftune.offsite.protocol.settings import PlugSettings


@dataclass(frozen=True, kw_only=True)
class Options(PlugSettings):
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


def run(options: Options) -> dict[str, Any]:
    """Check, plug in, save."""
    from siftune.cli.updates import show_updates
    from siftune.offsite.kit.folder import read_kit
    from siftune.offsite.protocol.plug import plug

    settings = PlugSettings(**{field.name: getattr(options, field.name) for field in fields(PlugSettings)})
    settings.check()
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with console.status("checking the return"):
        kit = read_kit(options.kit, options.public_key)
        result = plug(options.model, kit, options.returned, options.out, settings)
    show_updates(result.report)
    if (loss := result.report.loss) is not None:
        rows = f"{loss.rows} rows of {options.eval}"
        console.print(
            f"loss on {rows}, in nats per token: {loss.before:.4f} before, {loss.after:.4f} after", markup=False
        )
    console.print(f"tuned model in {result.folder}, in {result.dtype}", markup=False)
    return {
        "model": result.folder,
        "dtype": result.dtype,
        "kit": result.kit.digest,
        "verified": result.kit.verified,
        **result.report.to_dict(),
    }
