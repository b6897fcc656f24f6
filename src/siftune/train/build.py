"""Build the Trainer of a recipe: adapter, methods and casts, and their removal."""

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.training_args import OptimizerNames

from siftune.base.errors import RecipeError, UnsupportedError
from siftune.base.numerics import copies_asynchronously
from siftune.base.settings import nearest
from siftune.base.text import one_line
from siftune.data.batches import Collator
from siftune.data.rows import WEIGHT
from siftune.engine.compiled import CompiledParts
from siftune.engine.groups import group_by_layer
from siftune.engine.ranks import world_size
from siftune.engine.sharding import shard_base
from siftune.engine.substitution import use_base_dtype
from siftune.methods.dp.accounting import Mechanism, calibrated
from siftune.methods.dp.callback import DP
from siftune.methods.drivers.layer_callback import LayerCallback
from siftune.methods.keep.callback import Keep
from siftune.methods.options import OWN
from siftune.models.adapters.attach import attach_adapter, load_adapter, refuse_adapters, refuse_half
from siftune.models.adapters.full import OpenLayers
from siftune.models.layers import find_layers
from siftune.models.load import use_attention
from siftune.models.quantised import refuse_on_quantised
from siftune.recipe.checks import NO_TRACKER
from siftune.recipe.read import anchored
from siftune.recipe.schema import (
    Recipe,
    holds_out,
    method_of,
    select_until,
    settings_of,
    shape_of,
    target_comes_last,
)
from siftune.train.folder.weights import adapter_folder
from siftune.train.guards.non_finite import BAD_STEPS
from siftune.train.trainer import LayerTrainer, SiftTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """A Trainer that is ready to train."""

    trainer: SiftTrainer
    methods: Sequence[Any]  # its selection callbacks, layers before samples
    depth: int  # layers with trainable parameters
    # removes methods and casts from the model, however training ended. With adapter "full" the tuned layers are then in
    # the base's dtype again
    release: Callable[[], None]
    parts: CompiledParts | None = None  # compiled parts of the layers

    def compiling(self) -> float:
        """Seconds spent on compilation so far."""
        return 0.0 if self.parts is None else self.parts.seconds

    def active_layers(self) -> int:
        """Number of layers that train in the current step."""
        choices = [method.last for method in self.methods if isinstance(method, LayerCallback) and method.last]
        return len(choices[0].layers) if choices else self.depth


def build(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Dataset],
    output_dir: Path,
    callbacks: Sequence[TrainerCallback] = (),
    bad_steps: int = BAD_STEPS,
) -> Built:
    """Attach adapter and methods to a model, in place, and create the Trainer.

    Args:
        recipe: Resolved settings; with adapter "full" they name `layers`.
        model: The base model, or an emulator.
        tokenizer: Its tokenizer.
        data: Tokenised rows: `train`, and optionally `eval`, `support` and `keep`.
        output_dir: Folder of the checkpoints; nothing else is written.
        callbacks: Further callbacks, called before the methods.
        bad_steps: Non-finite steps to skip before training stops; private runs check none.

    Raises:
        InputError: The recipe does not fit the model.
    """
    refuse_all_weights(recipe)
    if recipe.dp_epsilon is not None:
        refuse_weights(data["train"].column_names)
    privacy = privacy_of(recipe, len(data["train"]))
    if privacy is not None:
        # a batch is a step's, and the noise is calibrated for this number of steps
        recipe = replace(recipe, accumulate=1, steps=privacy.mechanism.steps)
    use_attention(model, recipe.attention)
    arguments = training_arguments(recipe, output_dir, fp16=next(model.parameters()).dtype == torch.float16)
    if recipe.quantize is None and recipe.sharding == "none":
        model.to(arguments.device)  # now, since some accelerators replace the parameters of a model that moves
    set_seed(recipe.seed)  # initial values of the adapter, dropout, order of the rows
    opened = None
    tuned = model
    if recipe.adapter == "full":
        originals = recipe.keep is not None or any(part.suppresses for part in method_of(recipe).parts)
        opened = OpenLayers(model, recipe.layers, originals)
    else:
        tuned = _with_adapter(recipe, model, output_dir)
    if recipe.sharding == "fsdp":
        shard_base(tuned)
    methods = methods_of(recipe, data.get("support"))
    keeps = [] if recipe.keep is None else [keep_of(recipe, data.get("keep"))]
    parts = None
    if privacy is not None:
        refuse_scaled_or_split(arguments)
    if recipe.compile:  # methods that choose rows, and noise, look into every trainable module
        by_row = privacy is not None or any(part.rows for part in method_of(recipe).parts)
        parts = CompiledParts(find_layers(model).layers, frozen=by_row)
    kind: Any = SiftTrainer if opened is None else partial(LayerTrainer, opened=opened, base=anchored(recipe).model)
    trainer = kind(
        model=tuned,
        args=arguments,
        data_collator=Collator(tokenizer.pad_token_id),
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
        callbacks=[*callbacks, *methods, *keeps],
        last=target_comes_last(recipe),
        privacy=privacy,
        bad_steps=bad_steps,
        short_rows=recipe.attention == "auto",
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    groups = group_by_layer(tuned)
    stack = ExitStack()  # the last one is removed first
    stack.callback(end_checkpointing, tuned)
    if opened is not None:
        stack.callback(opened.close)
    stack.callback(use_base_dtype(tuned, groups).remove)
    for part in (parts, privacy, *methods, *keeps):
        if part is not None:
            stack.callback(part.remove)
    return Built(trainer, methods, len(groups), stack.close, parts)


def methods_of(recipe: Recipe, support_rows: Dataset | None) -> list[Any]:
    """Create the callbacks of a recipe's method, those that choose layers before those that choose samples.

    Args:
        recipe: Resolved settings.
        support_rows: Tokenised rows of a support set.
    """
    methods = []
    for part, settings in zip(method_of(recipe).parts, settings_of(recipe), strict=True):
        others = {"support_set": support_rows} if part.rows else {}
        method = part.build(settings, seed=recipe.seed, **others)
        if part.rows:
            method.select_until = select_until(recipe)
        methods.append(method)
    return methods


def keep_of(recipe: Recipe, rows: Dataset | None) -> Keep:
    """Create the penalty of a recipe with `keep`; `rows` are tokenised, None for own texts."""
    return Keep(OWN if rows is None else rows, weight=recipe.keep_weight, seed=recipe.seed)


def _with_adapter(recipe: Recipe, model: nn.Module, output_dir: Path) -> PeftModel:
    """Attach a new adapter, or that of `from_adapter`."""
    if recipe.from_adapter is not None:
        refuse_adapters(model)
        refuse_on_quantised(model, recipe.adapter)
        tuned = load_adapter(model, adapter_folder(recipe.from_adapter), recipe.model, exact=True, trainable=True)
        refuse_half(tuned)
        return tuned
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # between PEFT and transformers
        return attach_adapter(model, recipe.adapter, **vars(shape_of(recipe)))


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


def end_checkpointing(model: Any) -> None:
    """Disable the activation checkpointing that the Trainer enabled."""
    model = getattr(model, "get_base_model", lambda: model)()
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    if getattr(model, "supports_gradient_checkpointing", False):
        disable()
    model.disable_input_require_grads()


def refuse_all_weights(recipe: Recipe) -> None:
    """Refuse to train all weights of a model in every step.

    Raises:
        RecipeError: The adapter is "full", there are no `layers`, and the method does not choose layers.
    """
    chooses = any(not part.rows for part in method_of(recipe).parts)
    if recipe.adapter == "full" and recipe.layers is None and not chooses:
        raise RecipeError(
            "adapter is full and no layers are given: training all weights of a model is not what siftune is for; "
            "give --layers, such as 0 1 -2 -1, an adapter such as lora, or a method that chooses layers, such as rst"
        )


def trainable(built: Built) -> tuple[int, int]:
    """Number of trainable parameters, and of all."""
    model = built.trainer.model
    if isinstance(model, PeftModel):  # it counts two 4-bit parameters in a byte
        train, total = model.get_nb_trainable_parameters()
        return int(train), int(total)
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def privacy_of(recipe: Recipe, rows: int) -> DP | None:
    """Differential privacy of a recipe for a number of training rows; None if it asks for none.

    Raises:
        RecipeError: The guarantee would be empty for these rows, no noise achieves it, or Opacus is not installed.
    """
    if recipe.dp_epsilon is None or recipe.dp_delta is None:
        return None
    batch = recipe.batch_size * recipe.accumulate
    if batch > rows:
        raise RecipeError(
            f"a step would draw {batch} rows, but there are {rows}: with dp_epsilon lower --batch-size or --accumulate"
        )
    if recipe.dp_delta >= 1 / rows:
        raise RecipeError(
            f"dp_delta is {recipe.dp_delta:g}, but with {rows} rows it must be below {1 / rows:.2g}: otherwise "
            "the guarantee would allow to publish a row"
        )
    steps = recipe.steps or math.ceil(recipe.epochs * math.ceil(rows / batch))
    asked = Mechanism(recipe.dp_epsilon, recipe.dp_delta, recipe.dp_clip, rows, batch, steps)
    mechanism = calibrated(asked)
    logger.info("noise of %.4g times dp_clip in each of %d steps", mechanism.noise, steps)
    return DP(mechanism, recipe.batch_size)


def refuse_weights(columns: Sequence[str]) -> None:
    """Refuse weighted rows in a private run.

    Raises:
        UnsupportedError: Rows have weights.
    """
    if WEIGHT in columns:
        raise UnsupportedError(
            "rows have weights, but with dp_epsilon each row is clipped to the same norm, which undoes them: leave the "
            "column 'weight' out"
        )


def refuse_scaled_or_split(arguments: TrainingArguments) -> None:
    """Refuse scaled losses and several ranks in a private run.

    Raises:
        UnsupportedError: Training is in float16, or on several ranks.
    """
    if arguments.fp16:
        raise UnsupportedError(
            "training in float16 scales the loss, so clipping would not bound gradients: with dp_epsilon use --dtype "
            "bfloat16 or float32"
        )
    if world_size() > 1:
        raise UnsupportedError(
            f"{world_size()} ranks would each draw rows and noise, for which ε is not accounted: with dp_epsilon start "
            "one process"
        )


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
