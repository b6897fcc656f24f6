"""Out of memory: advice on options that need less (ours)."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from siftune.base.environment import empty_cache, launch_size, ran_out
from siftune.base.errors import TrainingError
from siftune.base.text import counted
from siftune.recipe.schema import Recipe, method_of

logger = logging.getLogger(__name__)


class OutOfMemory(TrainingError):
    """Out of memory while a run was set up or trained."""


@contextmanager
def memory_faults(recipe: Recipe) -> Iterator[None]:
    """Report a failed allocation with options that need less memory.

    Raises:
        OutOfMemory: An allocation in the block failed.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        reason = " ".join(str(error).split())[:150] or "MemoryError"
        raise OutOfMemory(
            f"memory ran out ({reason}) with {counted(recipe.batch_size, 'row')} of up to {recipe.max_length} tokens "
            f"in a forward pass: use less with {', '.join(_options(recipe))}; --dry-run measures a step"
        ) from error


def _options(recipe: Recipe) -> Iterator[str]:
    smaller = halved(recipe)
    if smaller is not None:
        yield f"--batch-size {smaller.batch_size} --accumulate {smaller.accumulate}"
    if not recipe.checkpointing:
        yield "--checkpointing"
    yield "a smaller --max-length"
    if recipe.quantize is None and recipe.adapter != "full" and torch.accelerator.is_available():
        yield "--quantize 4bit"
    if recipe.sharding == "none" and launch_size() > 1:
        yield "--sharding fsdp"


def halved(recipe: Recipe) -> Recipe | None:
    """The recipe with at most half of the rows in a forward pass and as many in an optimizer step; None if impossible.

    Methods that choose among the rows of a pass keep two.
    """
    rows = recipe.batch_size * recipe.accumulate
    least = 2 if any(part.rows for part in method_of(recipe).parts) else 1
    sizes = [size for size in range(recipe.batch_size // 2, least - 1, -1) if rows % size == 0]
    return replace(recipe, batch_size=sizes[0], accumulate=rows // sizes[0]) if sizes else None


def free() -> None:
    """Free the memory of a failed run, once nothing refers to it."""
    gc.collect()
    empty_cache()
