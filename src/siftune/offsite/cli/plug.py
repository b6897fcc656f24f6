"""`siftune plug`: put what a data owner returned into the base model."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic.dataclasses import dataclass

from siftune.base.settings import CONFIG
from siftune.base.stages import text_console
from siftune.cli.options import Flag
from siftune.offsite.cli.paths import refuse_swapped
from siftune.offsite.exchange.settings import PlugSettings

PATHS = {"folders": ("kit", "returned")}


@dataclass(kw_only=True, config=CONFIG)
class Options(PlugSettings):
    """Put a return into the model that its kit was made from, and save an ordinary model.

    The return must be for this kit and hold its tensors, no others, with finite numbers that did not move too far.
    """

    kit: Path
    """Folder of the kit that was handed out."""
    returned: Annotated[Path, Flag("return")]
    """Folder of what came back."""
    out: Path
    """Folder of the tuned model; must be new or empty."""
    model: str = "smollm2"
    """Model that the kit was made from: a folder, a hub id, or smollm2."""


def run(options: Options) -> dict[str, Any]:
    """Check, plug in, save."""
    refuse_swapped(options.kit, options.returned)
    from siftune.offsite.cli.updates import show_updates
    from siftune.offsite.exchange.plug import plug
    from siftune.offsite.kit.folder import read_kit

    settings = PlugSettings(**{field.name: getattr(options, field.name) for field in fields(PlugSettings)})
    settings.check()
    console = text_console(stderr=True)
    with console.status("checking what came back"):
        kit = read_kit(options.kit)
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
        "return": options.returned,
        **({"privacy": result.privacy} if result.privacy else {}),
        **result.report.to_dict(),
    }
