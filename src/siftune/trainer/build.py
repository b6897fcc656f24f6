"""From a recipe and a model in memory to a Trainer: adapter, methods and casts put on, and how they come off again."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from siftune.config import Recipe, method_of, settings_of
from siftune.data.tokenize import Collator
from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import use_base_dtype
from siftune.methods.layer_callback import LayerCallback
from siftune.models.adapters import attach_adapter
from siftune.models.full import OpenLayers
from siftune.models.source import use_attention
from siftune.trainer.arguments import end_checkpointing, training_arguments
from siftune.trainer.source import refuse_all_weights
from siftune.trainer.trainer import LayerTrainer, SiftTrainer


@dataclass(frozen=True)
class Built:
    """A Trainer that is ready to train.

    Attributes:
        trainer: The Trainer.
        methods: Its callbacks that choose what is updated: layers before samples.
        depth: Layers that have something to train.
        release: Takes methods and casts off the model when training has ended, however it did. Layers whose own
            weights trained (adapter "full") are then in the base's dtype again.
    """

    trainer: SiftTrainer
    methods: Sequence[Any]
    depth: int
    release: Callable[[], None]

    def active_layers(self) -> int:
        """How many layers train in the current step."""
        choices = [method.last for method in self.methods if isinstance(method, LayerCallback) and method.last]
        return len(choices[0].layers) if choices else self.depth


def build(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Dataset],
    output_dir: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Built:
    """Attach adapter and methods, and assemble the Trainer.

    Args:
        recipe: Resolved settings; with adapter "full" they name `layers`.
        model: The base model, or an emulator; it gets the adapter in place.
        tokenizer: Its tokenizer.
        data: Tokenised rows: `train`, and `eval` and `support` where there are any.
        output_dir: Where checkpoints go; nothing is written but these.
        callbacks: Further callbacks, which stand before the methods.

    Raises:
        InputError: The recipe does not fit the model.
    """
    refuse_all_weights(recipe)
    use_attention(model, recipe.attention)
    set_seed(recipe.seed)  # the adapter's first values, dropout, and the order of the rows
    opened = _opened(recipe, model)
    tuned = _adapted(recipe, model) if opened is None else model
    groups = group_by_layer(tuned)
    methods = methods_of(recipe, data.get("support"))
    kind = SiftTrainer if opened is None else partial(LayerTrainer, opened=opened, base=recipe.model)
    arguments = training_arguments(recipe, output_dir, fp16=next(model.parameters()).dtype == torch.float16)
    trainer = _trainer(kind, arguments, tuned, tokenizer, data, [*callbacks, *methods])
    with ExitStack() as stack:  # undone from the last to the first: the casts were there before the methods
        stack.callback(end_checkpointing, tuned)
        if opened is not None:
            stack.callback(opened.close)
        stack.callback(use_base_dtype(tuned, groups).remove)
        for method in methods:
            stack.callback(method.remove)
        release = stack.pop_all().close
    return Built(trainer, methods, len(groups), release)


def methods_of(recipe: Recipe, support_rows: Dataset | None) -> list[Any]:
    """Make the callbacks of a recipe's method: what chooses layers before what chooses samples.

    Args:
        recipe: Resolved settings.
        support_rows: Tokenised rows of a support set that the user gave.
    """
    methods = []
    for part, settings in zip(method_of(recipe).parts, settings_of(recipe), strict=True):
        others = {"support_set": support_rows} if part.rows else {}
        methods.append(part.build(settings, seed=recipe.seed, **others))
    return methods


def _opened(recipe: Recipe, model: nn.Module) -> OpenLayers | None:
    """Have the layers' own weights train, where the recipe says so."""
    if recipe.adapter != "full":
        return None
    originals = any(part.suppresses for part in method_of(recipe).parts)
    return OpenLayers(model, recipe.layers, originals, recipe.outside)


def _adapted(recipe: Recipe, model: nn.Module) -> PeftModel:
    targets = list(recipe.targets) if recipe.targets else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # between PEFT and transformers
        return attach_adapter(model, recipe.adapter, recipe.rank, recipe.alpha, recipe.dropout, targets, recipe.layers)


def _trainer(
    kind: Callable[..., SiftTrainer],
    arguments: TrainingArguments,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Dataset],
    callbacks: list[TrainerCallback],
) -> SiftTrainer:
    trainer = kind(
        model=model,
        args=arguments,
        data_collator=Collator(tokenizer.pad_token_id),
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer
