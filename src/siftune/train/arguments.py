"""Arguments of transformers' Trainer for a recipe, with its optimizer and trackers."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from siftune.base.errors import RecipeError
from siftune.base.numerics import copies_asynchronously
from siftune.base.settings import nearest
from siftune.base.text import one_line
from siftune.recipe.checks import NO_TRACKER
from siftune.recipe.schema import Recipe, holds_out

logger = logging.getLogger(__name__)


def training_arguments(recipe: Recipe, output_dir: Path, fp16: bool) -> TrainingArguments:
    """Trainer arguments of a resolved recipe; `fp16` for a model in float16."""
    # the name of activation checkpointing depends on the version of transformers
    new_name = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if new_name else "gradient_checkpointing"
    checkpointing: dict[str, Any] = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    if recipe.optim not in {each.value for each in OptimizerNames}:
        close = nearest(recipe.optim, [each.value for each in OptimizerNames])
        raise RecipeError(f"optim has the unknown name {recipe.optim!r}; did you mean {close or Recipe.optim!r}?")
    kind = _accelerator()
    asynchronous = kind is not None and copies_asynchronously(kind)
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
        optim=recipe.optim,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        **(checkpointing if recipe.checkpointing else {}),
        fp16=fp16 and _scales_losses(),
        seed=recipe.seed,
        full_determinism=recipe.deterministic,
        train_sampling_strategy="group_by_length" if recipe.group_by_length else "random",
        length_column_name="length",
        include_num_input_tokens_seen="non_padding",
        logging_steps=recipe.log_every,
        logging_first_step=True,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 500,
        eval_strategy="no" if not holds_out(recipe) else "steps" if recipe.eval_every else "epoch",
        eval_steps=recipe.eval_every,
        metric_for_best_model="loss" if holds_out(recipe) else None,
        prediction_loss_only=True,
        remove_unused_columns=False,  # the collator selects columns
        dataloader_pin_memory=asynchronous,
        accelerator_config={"non_blocking": asynchronous},  # the host does not wait for copies of batches
        logging_nan_inf_filter=False,  # `SiftTrainer` does so without waiting for the loss
        disable_tqdm=True,
        report_to=list(recipe.report_to),
        use_cpu=not torch.accelerator.is_available(),  # ranks without an accelerator must agree
        ddp_find_unused_parameters=False,  # gates provide the gradient of every trainable layer
    )
    check_optimizer(arguments)
    if arguments.n_gpu > 1:
        logger.warning("of %d GPUs the first is used; CUDA_VISIBLE_DEVICES selects another", arguments.n_gpu)
        arguments._n_gpu = 1  # the Trainer would copy the model by nn.DataParallel, where selection cannot reach
    return arguments


def _scales_losses() -> bool:
    """Whether there is an accelerator for which the Trainer scales losses in float16."""
    return _accelerator() in ("cuda", "xpu", "npu", "mlu", "musa")


def _accelerator() -> str | None:
    """Type of the accelerator, such as "cuda"."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if device is None else device.type


def check_optimizer(arguments: TrainingArguments) -> None:
    """Refuse an optimizer whose package is missing, and one that updates weights during backward.

    Raises:
        RecipeError: It cannot be used.
    """
    name = str(getattr(arguments.optim, "value", arguments.optim))
    if "layerwise" in name or "lomo" in name:
        raise RecipeError(f"optim {name} updates weights during backward, before gradients are clipped: take another")
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError, RuntimeError) as error:
        raise RecipeError(f"optim {name} cannot be used: {one_line(str(error))}") from error


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of a recipe's `report_to` are there, before the model is loaded.

    Raises:
        RecipeError: A tracker's package is missing.
    """
    if tuple(names) == (NO_TRACKER,):
        return
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    if missing := [name for name in names if name not in installed]:
        package = missing[0].replace("_", "-")
        raise RecipeError(
            f"the package of the tracker {missing[0]} is not installed: `pip install {package}`, or leave it out of "
            "report_to"
        )
