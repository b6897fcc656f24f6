"""siftune's own training path: a recipe in, a run folder out."""

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainingArguments, set_seed

from siftune.config import Recipe, check, resolve_recipe
from siftune.errors import RecipeError, TrainingError
from siftune.models.adapters import attach_adapter, group_by_layer, use_base_dtype
from siftune.models.source import load_model
from siftune.recipe_file import recipe_to_yaml
from siftune.train.callback import IST, RST
from siftune.train.card import model_card
from siftune.train.data import Collator, Row, load_rows, tokenize_rows
from siftune.train.disk import disk_faults
from siftune.train.memory import peak_memory_mb
from siftune.train.progress import Metrics, ProgressView
from siftune.train.resume import check_adapter, find_checkpoint, step_of
from siftune.train.run_folder import RunFolder
from siftune.train.sample_callback import GAST
from siftune.train.trainer import SiftTrainer

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A finished training run.

    Attributes:
        folder: Its folder.
        model: The tuned model, adapters attached.
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
    rows = _rows(recipe)  # before the model, which may have to be fetched
    model, tokenizer = load_model(recipe.model, recipe.dtype)
    data = {name: _tokenized(recipe, tokenizer, part) for name, part in rows.items()}
    console.print(f"{recipe.model}: {len(data['train'])} rows to train on, run folder {folder.path}")
    trainer, release = set_up(recipe, folder, model, tokenizer, data, console)
    if checkpoint is not None:
        check_adapter(checkpoint, trainer.model.peft_config["default"])
    folder.write("recipe.yaml", recipe_to_yaml(replace(recipe, resume=False)))
    summary = _fit(trainer, folder, recipe, checkpoint, release)
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
        recipe: Resolved settings.
        folder: Where metrics and selections go.
        model: The base model; it gets the adapter in place.
        tokenizer: Its tokenizer.
        data: Tokenised rows: `train`, and `eval` and `support` where there are any.
        console: Where progress goes.

    Returns:
        The Trainer, and what takes method and casts off the model when training has ended, however it did.
    """
    set_seed(recipe.seed)  # the adapter's first values, dropout, and the order of the rows
    tuned = _adapted(recipe, model)
    groups = group_by_layer(tuned)
    layers, samples = _layer_method(recipe), _sample_method(recipe, data.get("support"))
    methods = [method for method in (layers, samples) if method is not None]
    metrics = Metrics(folder, lambda: len(layers.last.layers) if layers and layers.last else len(groups))
    view = ProgressView(console)
    trainer = _trainer(recipe, folder, tuned, tokenizer, data, [metrics, view, *methods])
    if trainer.is_world_process_zero():
        _record(methods, folder, recipe.keep_scores)
    base_dtype = use_base_dtype(tuned, groups)

    def release() -> None:
        view.close()
        for method in reversed(methods):  # before the cast, which was there first
            method.remove()
        base_dtype.remove()
        _end_checkpointing(tuned.get_base_model())

    return trainer, release


def _fit(
    trainer: SiftTrainer, folder: RunFolder, recipe: Recipe, checkpoint: Path | None, release: Callable[[], None]
) -> dict[str, Any]:
    """Train, take everything off the model, and leave adapter, card and summary behind however training ends."""
    folder.cut_records(step_of(checkpoint) if checkpoint is not None else 0)  # of a run that got no further
    started = time.monotonic()
    status = "interrupted"
    try:
        with disk_faults(folder.path):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        status = "finished"
    except KeyboardInterrupt as stop:
        stop.add_note(_what_is_left(trainer, folder))
        raise
    except TrainingError as error:
        status = "stopped"
        raise TrainingError(f"{error} So far, {_what_is_left(trainer, folder)}.") from error
    finally:
        release()
        summary = _summary(trainer, time.monotonic() - started)
        if trainer.is_world_process_zero() and (status == "finished" or trainer.state.global_step > 0):
            folder.drop_half_written()
            _leave_behind(trainer, folder, recipe, status, summary)
    return summary


def _what_is_left(trainer: SiftTrainer, folder: RunFolder) -> str:
    step = trainer.state.global_step
    return f"the adapter after step {step} is in {folder.adapter}" if step else "no step was finished"


def _leave_behind(
    trainer: SiftTrainer, folder: RunFolder, recipe: Recipe, status: str, summary: dict[str, Any]
) -> None:
    """Write adapter, run.json and model card."""

    def save(path: Path) -> None:
        trainer.model.save_pretrained(path)
        trainer.processing_class.save_pretrained(path)
        (path / "README.md").write_text(model_card(recipe, summary), encoding="utf-8")

    with disk_faults(folder.path):
        folder.replace_adapter(save)
        folder.write_run(status=status, summary=summary)
        folder.write("README.md", model_card(recipe, summary))


def _summary(trainer: SiftTrainer, seconds: float) -> dict[str, Any]:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "eval_loss": evals[-1] if evals else None,
        "seconds": round(seconds, 2),
        "tokens": int(trainer.state.num_input_tokens_seen),
        "peak_memory_mb": round(peak_memory_mb(), 1),
    }


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


def _adapted(recipe: Recipe, model: nn.Module) -> PeftModel:
    targets = list(recipe.targets) if recipe.targets else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # between PEFT and transformers
        return attach_adapter(model, recipe.adapter, recipe.rank, recipe.alpha, recipe.dropout, targets)


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
        recipe.scale, recipe.replacement, recipe.temperature, recipe.decay, recipe.seed,
    )  # fmt: skip


def _record(methods: Sequence[IST | RST | GAST], folder: RunFolder, scores: bool) -> None:
    """Have every choice written to the run folder."""
    for method in methods:
        if isinstance(method, GAST):
            method.on_select = lambda samples: folder.append("selection.jsonl", samples.record(scores))
        else:
            method.on_select = lambda selection: folder.append("selection.jsonl", selection.record())


def _trainer(
    recipe: Recipe,
    folder: RunFolder,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, Dataset],
    callbacks: list[Any],
) -> SiftTrainer:
    trainer = SiftTrainer(
        model=model,
        args=_arguments(recipe, folder, fp16=next(model.parameters()).dtype == torch.float16),
        data_collator=Collator(tokenizer.pad_token_id),
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _arguments(recipe: Recipe, folder: RunFolder, fp16: bool) -> TrainingArguments:
    """A recipe in the Trainer's words."""
    return TrainingArguments(
        output_dir=str(folder.checkpoints),
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


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Activation checkpointing, under the name that this version of transformers has for it."""
    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}


def _end_checkpointing(model: Any) -> None:
    """Take off what the Trainer put on the model for activation checkpointing, if anything."""
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    if getattr(model, "supports_gradient_checkpointing", False):
        disable()
    model.disable_input_require_grads()


def _refuse_overwriting(recipe: Recipe, folder: RunFolder) -> None:
    if not recipe.resume and not folder.is_fresh():
        raise RecipeError(f"{folder.path} holds a run already; give another folder with --out, or go on with --resume.")
