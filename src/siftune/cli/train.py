"""`siftune train`: fine-tune from a recipe, from flags, or both."""

from dataclasses import dataclass
from typing import Any

from siftune.config import Recipe


@dataclass
class Options(Recipe):
    """Fine-tune a language model with adapters, updating only the layers that count.

    Give recipe files (.yaml), flags, or both: flags override recipes, a later recipe an earlier one.
    """


def run(options: Options) -> dict[str, Any]:
    """Train, and say what is where."""
    from rich.console import Console

    from siftune.train.run import train

    finished = train(options)
    summary = finished.summary
    path = finished.folder.path
    Console(stderr=True).print(
        f"done: {summary['steps']} steps in {summary['seconds']:.0f} s, peak {summary['peak_memory_mb']:,.0f} MB\n"
        f"adapter in {finished.folder.adapter}\n"
        f"next: `siftune eval {path} --data FILE`, `siftune export {path}`",
        highlight=False,
        soft_wrap=True,
    )
    return {"run": path, "adapter": finished.folder.adapter, **summary}
