"""What a recipe is in the words of transformers' Trainer."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from siftune.config import Recipe

logger = logging.getLogger(__name__)


def training_arguments(recipe: Recipe, output_dir: Path, fp16: bool) -> TrainingArguments:
    """A recipe in the Trainer's words.

    Args:
        recipe: Resolved settings.
        output_dir: Where checkpoints go.
        fp16: The model is in float16.
    """
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.steps or -1,
        learning_rate=recipe.lr,
        lr_scheduler_type=recipe.schedule if recipe.schedule != "constant" else "constant_with_warmup",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        **_checkpointing(recipe.checkpointing),
        fp16=fp16 and torch.cuda.is_available(),
        seed=recipe.seed,
        train_sampling_strategy="group_by_length" if recipe.group_by_length else "random",
        length_column_name="length",
        include_num_input_tokens_seen="non_padding",
        logging_steps=recipe.log_every,
        logging_first_step=True,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 500,
        eval_strategy="no" if not recipe.eval else "steps" if recipe.eval_every else "epoch",
        eval_steps=recipe.eval_every,
        prediction_loss_only=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=True,
        report_to=recipe.report_to,
    )
    if arguments.n_gpu > 1:
        logger.warning("%d GPUs are there, the first is used; CUDA_VISIBLE_DEVICES names another", arguments.n_gpu)
        arguments._n_gpu = 1  # else the Trainer copies the model by nn.DataParallel, out of reach of selection
    return arguments


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Activation checkpointing, under the name that this version of transformers has for it."""
    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}


def end_checkpointing(model: Any) -> None:
    """Take off what the Trainer put on the model for activation checkpointing, if anything."""
    model = getattr(model, "get_base_model", lambda: model)()
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    if getattr(model, "supports_gradient_checkpointing", False):
        disable()
    model.disable_input_require_grads()
