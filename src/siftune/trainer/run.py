"""siftune's own training path: a recipe in, a run folder out."""

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainingArguments, set_seed

from siftune.config import Recipe, check, resolve_recipe
from siftune.data.readers import load_rows
from siftune.data.rows import Row
from siftune.data.tokenize import Collator, tokenize_rows
from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import use_base_dtype
from siftune.errors import RecipeError, TrainingError
from siftune.methods.gast.callback import GAST
from siftune.methods.ist.callback import IST, RST
from siftune.models.adapters import attach_adapter
from siftune.models.full import OpenLayers
from siftune.models.source import load_model, use_attention
from siftune.offsite.protocol.tune import kit_of, load_tunable, settle_layers
from siftune.recipe_file import recipe_to_yaml
from siftune.trainer.arguments import end_checkpointing, training_arguments
from siftune.trainer.checkpoints import check_adapter, check_layers, find_checkpoint, step_of
from siftune.trainer.disk import disk_faults
from siftune.trainer.outcome import Outcome
from siftune.trainer.progress import Metrics, ProgressView
from siftune.trainer.run_folder import RunFolder
from siftune.trainer.trainer import LayerTrainer, SiftTrainer

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A finished training run.

    Attributes:
        folder: Its folder.
        model: The tuned model, adapters attached where it has any.
        tokenizer: Its tokenizer.
        summary: Steps, losses, seconds, tokens per second, peak memory in MB.
    """

    folder: RunFolder
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    summary: dict[str, Any]


def train(recipe: Recipe, console: Console | None = None) -> Run:
    """Fine-tune as `recipe` says.

    Args:
        recipe: Settings; checked and resolved here.
        console: Where progress goes; stderr by default.

    Raises:
        InputError: On anything in the recipe, the data or the model that cannot be used. Where training had
            begun, the adapter as it stood after the last whole step is in the run folder.
    """
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    check(recipe)
    recipe = resolve_recipe(recipe)
    folder = RunFolder(str(recipe.out))
    checkpoint = find_checkpoint(recipe, folder)
    _refuse_overwriting(recipe, folder)
    kit = kit_of(recipe.model)
    recipe = settle_layers(recipe, kit)
    rows = _rows(recipe)  # before the model, which may have to be fetched
    model, tokenizer = load_model(recipe.model, recipe.dtype) if kit is None else load_tunable(kit, recipe.dtype)
    data = {name: _tokenized(recipe, tokenizer, part) for name, part in rows.items()}
    console.print(f"{recipe.model}: {len(data['train'])} rows to train on, run folder {folder.path}")
    trainer, release = set_up(recipe, folder, model, tokenizer, data, console)
    if checkpoint is not None:
        _check_checkpoint(checkpoint, trainer)
    folder.write("recipe.yaml", recipe_to_yaml(replace(recipe, resume=False)))
    summary = _fit(Outcome(trainer, folder, recipe, kit), checkpoint, release)
    return Run(folder, trainer.model, tokenizer, summary)


def set_up(
    recipe: Recipe,
    folder: RunFolder,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, Dataset],
    console: Console,
) -> tuple[SiftTrainer, Callable[[], None]]:
    """Attach adapter and method, and assemble the Trainer.

    Args:
        recipe: Resolved settings; with adapter "full" they name `layers`.
        folder: Where metrics and selections go.
        model: The base model, or an emulator; it gets the adapter in place.
        tokenizer: Its tokenizer.
        data: Tokenised rows: `train`, and `eval` and `support` where there are any.
        console: Where progress goes.

    Returns:
        The Trainer, and what takes method and casts off the model when training has ended, however it did. Layers
        whose own weights trained (adapter "full") are then in the base's dtype again.
    """
    settle_layers(recipe, None)
    use_attention(model, recipe.attention)
    set_seed(recipe.seed)  # the adapter's first values, dropout, and the order of the rows
    opened = _opened(recipe, model)
    tuned = _adapted(recipe, model) if opened is None else model
    groups = group_by_layer(tuned)
    layers, samples = _layer_method(recipe), _sample_method(recipe, data.get("support"))
    methods = [method for method in (layers, samples) if method is not None]
    metrics = Metrics(folder, lambda: len(layers.last.layers) if layers and layers.last else len(groups))
    view = ProgressView(console)
    build = SiftTrainer if opened is None else partial(LayerTrainer, opened=opened, base=recipe.model)
    arguments = training_arguments(recipe, folder, fp16=next(model.parameters()).dtype == torch.float16)
    trainer = _trainer(build, arguments, tuned, tokenizer, data, [metrics, view, *methods])
    if trainer.is_world_process_zero():
        _record(methods, folder, recipe.keep_scores)
    base_dtype = use_base_dtype(tuned, groups)

    def release() -> None:
        view.close()
        for method in reversed(methods):  # before the cast, which was there first
            method.remove()
        base_dtype.remove()
        if opened is not None:
            opened.close()
        end_checkpointing(tuned)

    return trainer, release


def _fit(outcome: Outcome, checkpoint: Path | None, release: Callable[[], None]) -> dict[str, Any]:
    """Train, take everything off the model, and leave result, card and summary behind however training ends."""
    trainer, folder = outcome.trainer, outcome.folder
    folder.cut_records(step_of(checkpoint) if checkpoint is not None else 0)  # of a run that got no further
    started = time.monotonic()
    status = "interrupted"
    try:
        with disk_faults(folder.path):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        status = "finished"
    except KeyboardInterrupt as stop:
        stop.add_note(outcome.words())
        raise
    except TrainingError as error:
        status = "stopped"
        raise TrainingError(f"{error} So far, {outcome.words()}.") from error
    finally:
        release()
        summary = outcome.summary(time.monotonic() - started)
        if trainer.is_world_process_zero() and (status == "finished" or trainer.state.global_step > 0):
            folder.drop_half_written()
            outcome.leave(status, summary)
    return summary


def _rows(recipe: Recipe) -> dict[str, list[Row]]:
    """Read the training rows, and held-out and support rows where there are any."""
    rows = {"train": load_rows(recipe.train, recipe.train_split, recipe.limit, recipe.format)}
    if recipe.eval:
        rows["eval"] = load_rows(recipe.eval, recipe.eval_split, recipe.eval_limit, recipe.format)
    if recipe.support_rows and "gast" in recipe.method:
        rows["support"] = load_rows(recipe.support_rows, recipe.train_split, None, recipe.format)
    return rows


def _tokenized(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> Dataset:
    return tokenize_rows(rows, tokenizer, recipe.max_length, recipe.template, recipe.completion_only)


def _opened(recipe: Recipe, model: nn.Module) -> OpenLayers | None:
    """Have the layers' own weights train, where the recipe says so."""
    if recipe.adapter != "full" or recipe.layers is None:
        return None
    return OpenLayers(model, recipe.layers, originals=recipe.method.startswith("ist"))


def _adapted(recipe: Recipe, model: nn.Module) -> PeftModel:
    targets = list(recipe.targets) if recipe.targets else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # between PEFT and transformers
        return attach_adapter(model, recipe.adapter, recipe.rank, recipe.alpha, recipe.dropout, targets, recipe.layers)


def _layer_method(recipe: Recipe) -> IST | RST | None:
    if recipe.method.startswith("ist"):
        return IST(
            recipe.active, recipe.interval, recipe.score_batch_size, recipe.candidates, recipe.suppressed,
            recipe.factor, recipe.score_lr, recipe.seed,
        )  # fmt: skip
    return RST(recipe.active, recipe.seed) if recipe.method == "rst" else None


def _sample_method(recipe: Recipe, support_set: Dataset | None) -> GAST | None:
    if "gast" not in recipe.method:
        return None
    return GAST(
        recipe.select, recipe.support, recipe.support_size, support_set, recipe.choice, recipe.score, recipe.pool,
        recipe.scale, recipe.replacement, recipe.temperature, recipe.decay, recipe.select_after, recipe.seed,
    )  # fmt: skip


def _record(methods: Sequence[IST | RST | GAST], folder: RunFolder, scores: bool) -> None:
    """Have every choice written to the run folder."""
    for method in methods:
        if isinstance(method, GAST):
            method.on_select = lambda samples: folder.append("selection.jsonl", samples.record(scores))
        else:
            method.on_select = lambda selection: folder.append("selection.jsonl", selection.record())


def _trainer(
    build: Callable[..., SiftTrainer],
    arguments: TrainingArguments,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, Dataset],
    callbacks: list[Any],
) -> SiftTrainer:
    trainer = build(
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


def _check_checkpoint(checkpoint: Path, trainer: SiftTrainer) -> None:
    """Refuse a checkpoint of another run."""
    if isinstance(trainer, LayerTrainer):
        check_layers(checkpoint, trainer.layers)
    else:
        check_adapter(checkpoint, trainer.model.peft_config["default"])


def _refuse_overwriting(recipe: Recipe, folder: RunFolder) -> None:
    if not recipe.resume and not folder.is_fresh():
        raise RecipeError(f"{folder.path} holds a run already; give another folder with --out, or go on with --resume.")
