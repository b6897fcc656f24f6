"""A sifting at work: its recipe, rows and folder, the files in it, and the base model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch
from rich.console import Console

from siftune.base.ranks import first_rank_first
from siftune.base.work_folder import WorkFolder
from siftune.data.tokens import Form
from siftune.models.load import use_attention
from siftune.recipe.schema import Recipe
from siftune.sifting.pool import Rows
from siftune.train.source import Source

LOSSES, PROMPTS, SIMILAR, TUNING = "losses.jsonl", "prompts.f32", "similar.jsonl", "tuning"
_WIDER = 4  # times the rows of a training step in a forward pass, unless the step saves no activations


@dataclass(frozen=True)
class Work:
    """A sifting: its recipe, rows and folder."""

    recipe: Recipe
    rows: Rows
    steps: int
    folder: WorkFolder
    console: Console
    source_of: Callable[[str], Source]
    records: IO[str] | None = None  # of the pool, by `files.copied_records`, on the first rank


def base_model(work: Work) -> Any:
    """Load the model."""
    recipe, source = work.recipe, work.source_of(work.recipe.model)
    with first_rank_first():
        model, _ = source.load(recipe.dtype, recipe.quantize)
    use_attention(model, recipe.attention)
    if torch.accelerator.is_available() and recipe.quantize is None:  # quantized weights are there already
        model = model.to(torch.accelerator.current_accelerator())
    return model


def form_of(work: Work) -> Form:
    """How rows with compared answers become tokens."""
    return Form(work.source_of(work.recipe.model).tokenizer(), work.recipe.max_length, work.recipe.template)


def rows_at_once(recipe: Recipe) -> int:
    """Rows in a forward pass, which saves no activations, as a step with checkpointing hardly does."""
    return (1 if recipe.checkpointing else _WIDER) * recipe.batch_size
