"""Whether and how a run's layers are compiled."""

import logging
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from siftune.config import Recipe, method_of
from siftune.engine.compiled import CompiledParts
from siftune.errors import UnsupportedError
from siftune.models.layers import find_layers
from siftune.recipe_checks import can_compile
from siftune.trainer.plan import planned_steps

logger = logging.getLogger(__name__)

# (ours; docs/devices.md) tokens of a run times weights of its layers, from which on compiling pays with auto
PAYS_FROM = 2e13


def compiled_parts(
    recipe: Recipe, model: nn.Module, arguments: TrainingArguments, rows: Dataset
) -> CompiledParts | None:
    """Compile the parts of a model's layers, where its recipe says so.

    Methods that choose rows, and noise on rows' gradients, look into every module that trains: with them only those
    parts are compiled in which nothing does.

    Args:
        recipe: Resolved settings.
        model: The model, adapter and all, before methods and casts are put on it.
        arguments: The recipe in the Trainer's words.
        rows: Tokenised training rows.

    Raises:
        UnsupportedError: `compile` is on, and the layers cannot be compiled.
    """
    if recipe.compile == "off":
        return None
    demanded = recipe.compile == "on"
    by_row = recipe.dp_epsilon is not None or any(part.rows for part in method_of(recipe).parts)
    layers = find_layers(model).layers
    seen = planned_steps(arguments, len(rows)) * recipe.accumulate * recipe.batch_size
    tokens = seen * float(np.mean(rows["length"]))
    if not demanded and (by_row or not can_compile(recipe) or not _pays(layers, tokens)):
        return None
    try:
        return CompiledParts(layers, frozen=by_row, demanded=demanded)
    except UnsupportedError as error:
        if demanded:
            raise
        logger.warning("nothing is compiled: %s", error)
        return None


def _pays(layers: Any, tokens: float) -> bool:
    """Whether a run is long enough (ours): known from recipe, rows and model, so that a resumed run decides alike."""
    weights = sum(p.numel() for layer in layers for p in layer.parameters())
    on_processor = all(p.device.type == "cpu" for layer in layers for p in layer.parameters())
    return on_processor and tokens * weights >= PAYS_FROM
