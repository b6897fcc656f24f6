"""Build the Trainer of a recipe: adapter, methods and casts, and their removal."""

import logging
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
    TrainerCallback,
    set_seed,
)

from siftune.data.batches import Collator
from siftune.engine.compiled import CompiledParts
from siftune.engine.groups import group_by_layer
from siftune.engine.sharding import shard_base
from siftune.engine.substitution import use_base_dtype
from siftune.methods.dp.callback import DP
from siftune.methods.drivers.layer_callback import LayerCallback
from siftune.methods.keep.callback import Keep
from siftune.methods.options import OWN
from siftune.models.adapters.attach import attach_adapter, load_adapter, refuse_adapters, refuse_half
from siftune.models.adapters.full import OpenLayers
from siftune.models.layers import find_layers
from siftune.models.load import use_attention
from siftune.models.modules import inner_model
from siftune.models.quantised import refuse_on_quantised
from siftune.recipe.checks import refuse_all_weights
from siftune.recipe.read import anchored
from siftune.recipe.schema import (
    Recipe,
    method_of,
    select_until,
    settings_of,
    shape_of,
    target_comes_last,
)
from siftune.train.arguments import training_arguments
from siftune.train.folder.weights import adapter_folder
from siftune.train.guards.non_finite import BrokenSteps
from siftune.train.private import privacy_of, refuse_scaled_or_split, refuse_weights
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
    broken: BrokenSteps | None = None,
    on_select: Callable[[Any], None] | None = None,
) -> Built:
    """Attach adapter and methods to a model, in place, and create the Trainer.

    The order: privacy first, since it determines the steps in the Trainer's arguments. The model moves to its device
    before anything refers to its parameters, and the seed is set just before the adapter draws its first values.
    Sharding follows, as it splits the base's weights but not the adapter's. Methods exist before the Trainer, whose
    callbacks they are. Casts come last, since they wrap what the others attached. Removal is in reverse.

    Args:
        recipe: Resolved settings; with adapter "full" they name `layers`.
        model: The base model, or an emulator.
        tokenizer: Its tokenizer.
        data: Tokenised rows: `train`, and optionally `eval`, `support` and `keep`.
        output_dir: Folder of the checkpoints; nothing else is written.
        callbacks: Further callbacks, called before the methods.
        broken: Guard against non-finite steps, which private runs do not use.
        on_select: Callback for each choice of the methods.

    Raises:
        InputError: The recipe does not fit the model.
    """
    refuse_all_weights(recipe)
    recipe, privacy = _with_privacy(recipe, data["train"])
    arguments = training_arguments(recipe, output_dir, fp16=next(model.parameters()).dtype == torch.float16)
    if privacy is not None:
        refuse_scaled_or_split(arguments)
    use_attention(model, recipe.attention)
    if recipe.quantize is None and recipe.sharding == "none":
        model.to(arguments.device)  # now, since some accelerators replace the parameters of a model that moves
    set_seed(recipe.seed)  # initial values of the adapter, dropout, order of the rows
    tuned, opened = _model_to_train(recipe, model)
    methods = methods_of(recipe, data.get("support"), on_select)
    keeps = [] if recipe.keep is None else [keep_of(recipe, data.get("keep"))]
    parts = _compiled_parts(recipe, model, privacy)
    trainer = _trainer(
        recipe,
        opened,
        model=tuned,
        args=arguments,
        data_collator=Collator(tokenizer.pad_token_id),
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
        callbacks=[*callbacks, *methods, *keeps],
        privacy=privacy,
        broken=broken or BrokenSteps(),
    )
    groups = group_by_layer(tuned)
    casts = use_base_dtype(tuned, groups)
    release = _removal(tuned, opened, [casts, parts, privacy, *methods, *keeps])
    return Built(trainer, methods, len(groups), release, parts)


def _with_privacy(recipe: Recipe, rows: Dataset) -> tuple[Recipe, DP | None]:
    """Return a recipe with the steps of its privacy, and the privacy; None if it asks for none."""
    if recipe.dp_epsilon is not None:
        refuse_weights(rows.column_names)
    privacy = privacy_of(recipe, len(rows))
    if privacy is None:
        return recipe, None
    # a batch is a step's, and the noise is calibrated for this number of steps
    return replace(recipe, accumulate=1, steps=privacy.mechanism.steps), privacy


def _model_to_train(recipe: Recipe, model: nn.Module) -> tuple[nn.Module, OpenLayers | None]:
    """Attach the adapter, or open the layers of adapter "full"; then shard the base if the recipe asks for it.

    Returns:
        The model to train, and its open layers; None with an adapter.
    """
    tuned, opened = model, None
    if recipe.adapter == "full":
        originals = recipe.keep is not None or any(part.suppresses for part in method_of(recipe).parts)
        opened = OpenLayers(model, recipe.layers, originals)
    else:
        tuned = _with_adapter(recipe, model)
    if recipe.sharding == "fsdp":
        shard_base(tuned)
    return tuned, opened


def _with_adapter(recipe: Recipe, model: nn.Module) -> PeftModel:
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


def methods_of(
    recipe: Recipe, support_rows: Dataset | None, on_select: Callable[[Any], None] | None = None
) -> list[Any]:
    """Create the callbacks of a recipe's method, those that choose layers before those that choose samples.

    Args:
        recipe: Resolved settings.
        support_rows: Tokenised rows of a support set.
        on_select: Callback for each choice of layers or samples.
    """
    methods = []
    for part, settings in zip(method_of(recipe).parts, settings_of(recipe), strict=True):
        others = {"support_set": support_rows, "select_until": select_until(recipe)} if part.rows else {}
        methods.append(part.build(settings, seed=recipe.seed, on_select=on_select, **others))
    return methods


def keep_of(recipe: Recipe, rows: Dataset | None) -> Keep:
    """Create the penalty of a recipe with `keep`; `rows` are tokenised, None for own texts."""
    return Keep(OWN if rows is None else rows, weight=recipe.keep_weight, seed=recipe.seed)


def _compiled_parts(recipe: Recipe, model: nn.Module, privacy: DP | None) -> CompiledParts | None:
    """Compile parts of the layers if the recipe asks for it."""
    if not recipe.compile:
        return None
    # methods that choose rows, and noise, look into every trainable module
    by_row = privacy is not None or any(part.rows for part in method_of(recipe).parts)
    return CompiledParts(find_layers(model).layers, frozen=by_row)


def _trainer(recipe: Recipe, opened: OpenLayers | None, **others: Any) -> SiftTrainer:
    """Create the Trainer, which prints nothing; `others` are its further arguments."""
    kind: Any = SiftTrainer if opened is None else partial(LayerTrainer, opened=opened, base=anchored(recipe).model)
    trainer: SiftTrainer = kind(last=target_comes_last(recipe), short_rows=recipe.attention == "auto", **others)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _removal(tuned: nn.Module, opened: OpenLayers | None, attached: Sequence[Any]) -> Callable[[], None]:
    """Return the removal of all attachments from a model.

    Args:
        tuned: The model.
        opened: Its open layers; None with an adapter.
        attached: Further attachments with `remove()`, the first to be removed last; None for a missing one.
    """
    stack = ExitStack()  # the last one is removed first
    stack.callback(end_checkpointing, tuned)
    if opened is not None:
        stack.callback(opened.close)
    for part in attached:
        if part is not None:
            stack.callback(part.remove)
    return stack.close


def end_checkpointing(model: Any) -> None:
    """Disable the activation checkpointing that the Trainer enabled."""
    model = inner_model(model)
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    if getattr(model, "supports_gradient_checkpointing", False):
        disable()
    model.disable_input_require_grads()


def trainable(built: Built) -> tuple[int, int]:
    """Number of trainable parameters, and of all."""
    model = built.trainer.model
    if isinstance(model, PeftModel):  # it counts two 4-bit parameters in a byte
        train, total = model.get_nb_trainable_parameters()
        return int(train), int(total)
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
