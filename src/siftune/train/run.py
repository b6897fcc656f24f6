"""siftune's own training path: from a recipe to a run folder."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from siftune.base.errors import RecipeError, TrainingError
from siftune.base.files import disk_faults
from siftune.base.quiet import quiet, unsaid
from siftune.base.stages import stages
from siftune.base.words import counted
from siftune.data.rows import Row
from siftune.data.target import sources
from siftune.engine.ranks import first_rank_first, from_first, join_launch, leave_launch, let_go, rank, world_size
from siftune.methods.drivers.sample_choice import SampleChoice
from siftune.methods.host.callback import stand_first
from siftune.methods.host.spread import refuse_launched
from siftune.recipe.checks import check
from siftune.recipe.read import anchored, recipe_to_yaml
from siftune.recipe.schema import Recipe, resolve_recipe
from siftune.records.record import RowRecord
from siftune.records.rows import BAD_ROWS, read_rows
from siftune.records.rows import digest_of as digest_of_texts
from siftune.records.visits import NAME
from siftune.train.build import Built, build, check_trackers, trainable
from siftune.train.callbacks import EarlyStop, Metrics, ProgressView, RegularCheckpoints
from siftune.train.folder.checkpoints import best_in, step_of
from siftune.train.folder.run import RECIPE, ROWS, RunFolder
from siftune.train.folder.selections import SelectionRecord
from siftune.train.folder.weights import adopted
from siftune.train.guards.memory import OutOfMemory, free, halved, memory_faults, refuse_ranks
from siftune.train.guards.non_finite import refuse_broken_end
from siftune.train.guards.signals import Interrupts
from siftune.train.prepare import (
    NAMED,
    ModelSource,
    Prepared,
    Source,
    bad_lines,
    prepare,
    refuse_read,
    rows_line,
    steps_in_words,
)
from siftune.train.results import Followed, Outcome
from siftune.train.resume import check_adapter, check_layers, check_same, digest_of, end_of, find_checkpoint
from siftune.train.trainer import LayerTrainer, SiftTrainer, planned_steps

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A finished training run."""

    folder: RunFolder
    model: nn.Module  # the tuned model, adapters attached where it has any
    tokenizer: PreTrainedTokenizerBase
    summary: dict[str, Any]  # steps, losses, seconds, tokens per second, peak memory in MB


def train(recipe: Recipe, console: Console | None = None, source_of: Callable[[str], Source] = ModelSource) -> Run:
    """Fine-tune as `recipe` says.

    Args:
        recipe: Settings; checked and resolved here.
        console: Where progress goes; stderr by default.
        source_of: Turns the recipe's `model` into what is tuned; by default an ordinary model.

    Raises:
        InputError: On anything in the recipe, the data or the model that cannot be used. Where training had
            begun, the adapter as it stood after the last whole step is in the run folder; else there is none.
    """
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    check(recipe)
    check_trackers(recipe.report_to)
    refuse_launched()
    refuse_ranks(recipe)
    joined = join_launch()
    recipe = from_first(lambda: resolve_recipe(adopted(recipe)))
    folder = from_first(lambda: RunFolder(str(recipe.out)))
    with folder.taken_back() if rank() == 0 else nullcontext():
        run = _train_in_memory(recipe, folder, console if rank() == 0 else Console(quiet=True), source_of)
    if joined:
        leave_launch()
    return run


def _train_in_memory(recipe: Recipe, folder: RunFolder, console: Console, source_of: Callable[[str], Source]) -> Run:
    """Train with as many rows in a forward pass as memory holds, where the recipe asks for that."""
    while True:
        try:
            with memory_faults(recipe):
                return _train(recipe, folder, console, source_of)
        except OutOfMemory:
            smaller = halved(recipe) if recipe.auto_batch else None
            if smaller is None:
                raise
        free()  # what the error held is gone only now
        given = recipe.batch_size, smaller.batch_size, smaller.accumulate
        logger.warning("memory ran out with batch_size %d: from here on batch_size %d, accumulate %d", *given)
        recipe = replace(smaller, resume=folder.has_checkpoint())


def _train(recipe: Recipe, folder: RunFolder, console: Console, source_of: Callable[[str], Source]) -> Run:
    """Train by a resolved recipe, into a folder that is there."""
    checkpoint = from_first(lambda: find_checkpoint(recipe, folder)) if recipe.resume else None
    _refuse_overwriting(recipe, folder)
    source = source_of(recipe.model)
    recipe = source.settle(recipe)
    read = read_rows(recipe)  # before the model, which may have to be fetched
    refuse_read(recipe, read, source.tokenizer)
    with first_rank_first():
        model, tokenizer = source.load(recipe.dtype, recipe.quantize)
    with first_rank_first(), stages(console) as told:  # the others find the tokens in the cache
        prepared = prepare(recipe, tokenizer, read, told)
    rows, data = prepared.rows, prepared.data
    view = ProgressView(console)
    metrics = Metrics(folder, lambda: built.active_layers(), lambda: built.compiling())
    kinds, signals = sources(rows["train"]), Interrupts()
    selections = [SelectionRecord(folder.path, kinds)] if rank() == 0 else []
    records: list[RowRecord | SelectionRecord] = [*_row_record(recipe, folder, rows["train"]), *selections]
    own = [metrics, view, *_saving(recipe), *records, signals]
    built = build(recipe, model, tokenizer, data, folder.checkpoints, own)
    built.trainer.broken.name = lambda row: rows["train"][row].origin
    stand_first(built.trainer, metrics)  # trackers read a line before other callbacks extend it
    digest = digest_of(data["train"])
    ended = checkpoint is not None and _has_ended(checkpoint, recipe, digest, built.trainer, folder)
    followed = Followed(kinds)
    for each in selections:
        _record(built, each, followed)
    recorded = anchored(replace(recipe, resume=False))
    console.print(short_form(recipe, prepared, built, folder.path), markup=False)
    if rank() == 0:
        _leave_start(folder, recorded, prepared, digest)

    def release() -> None:
        view.close()
        built.release()
        for part in records:
            part.leave()

    fit = partial(_train_on, built.trainer, signals, checkpoint, ended, best=recipe.patience is not None)
    begun = 0 if checkpoint is None else step_of(checkpoint)
    if rank() == 0:
        folder.cut_records(begun)  # of a run that got no further
    summary = _fit(Outcome(built.trainer, folder, recorded, source, followed, begun), fit, release)
    if world_size() > 1:
        let_go(built.trainer)
    return Run(folder, built.trainer.model, tokenizer, summary)


def _train_on(trainer: SiftTrainer, signals: Interrupts, checkpoint: Path | None, ended: bool, best: bool) -> None:
    """Train to the end, or take what a checkpoint holds that is the end already: the `best` weights where asked for.

    Raises:
        KeyboardInterrupt: A signal came.
        TrainingError: Training broke, also at its very end.
    """
    if ended and checkpoint is not None:
        trainer.take(checkpoint, best)
    else:
        # the best is looked for where the run was begun, and found again in the run's folder at the next save
        moved = checkpoint is not None and best_in(Path(trainer.args.output_dir), checkpoint) is not None
        elsewhere = unsaid("transformers.trainer", "The best checkpoint") if moved else nullcontext()
        # which compares times of files and arguments of a checkpoint: ours are checked by siftune itself
        with signals.listening(), quiet("transformers.trainer_utils"), elsewhere:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if signals.came:
        raise KeyboardInterrupt
    if trainer.kept_step is None:
        refuse_broken_end(trainer.state)


def _saving(recipe: Recipe) -> list[TrainerCallback]:
    """What decides when checkpoints are made, and when training stops, where the Trainer does not."""
    regular = [] if recipe.save_every else [RegularCheckpoints()]
    return [*regular, *([] if recipe.patience is None else [EarlyStop(recipe.patience)])]


def _has_ended(checkpoint: Path, recipe: Recipe, digest: str, trainer: SiftTrainer, folder: RunFolder) -> bool:
    """Whether a checkpoint's run was killed after its last step, before it had left what was trained.

    Raises:
        RecipeError: The checkpoint is of another run, or has nothing left to do.
    """
    check_same(checkpoint, recipe, digest)
    _check_checkpoint(checkpoint, trainer)
    ended = end_of(checkpoint, trainer.args, len(trainer.train_dataset), recipe.patience)
    if ended and folder.has_left(checkpoint):
        raise RecipeError(ended)
    return ended is not None


def _leave_start(folder: RunFolder, recorded: Recipe, prepared: Prepared, digest: str) -> None:
    """Leave in the folder what a run is begun with."""
    _write_lines(folder, BAD_ROWS, prepared.bad)
    folder.write(RECIPE, recipe_to_yaml(recorded))
    folder.write(ROWS, f"{digest}\n")


def _fit(outcome: Outcome, fit: Callable[[], None], release: Callable[[], None]) -> dict[str, Any]:
    """Train, take everything off the model, and leave result, card and summary behind however training ends."""
    trainer, folder = outcome.trainer, outcome.folder
    started = time.monotonic()
    status = "interrupted"
    try:
        with disk_faults(folder.path), memory_faults(outcome.recipe):
            fit()
        status = "finished"
    except KeyboardInterrupt as stop:
        stop.add_note(outcome.words())
        raise
    except TrainingError as error:
        status = "stopped"
        raise type(error)(f"{error} So far, {outcome.words()}.") from error
    finally:
        release()
        summary = outcome.summary(time.monotonic() - started)
        if trainer.is_world_process_zero() and (status == "finished" or trainer.state.global_step > 0):
            folder.drop_half_written()
            outcome.leave(status, summary)
    return summary


def _write_lines(folder: RunFolder, name: str, lines: Sequence[Any]) -> None:
    """Write a file of the run folder, or take away that of a run that was begun here with other rows."""
    if lines:
        folder.write(name, "".join(f"{line}\n" for line in lines))
    else:
        (folder.path / name).unlink(missing_ok=True)


def _row_record(recipe: Recipe, folder: RunFolder, rows: Sequence[Row]) -> list[RowRecord]:
    """What records every row's losses; in a private run nothing, as no noise covers them."""
    if recipe.dp_epsilon is not None:
        return []
    return [RowRecord(folder.path / NAME, [row.origin for row in rows], digest_of_texts(rows))]


def _record(built: Built, record: SelectionRecord, followed: Followed) -> None:
    """Have every choice written to the run folder; of rows by their numbers in the training rows, too."""

    def note(choice: Any) -> None:
        if isinstance(choice, SampleChoice):
            record.rows(choice, built.trainer.rows)
            followed.note(choice, built.trainer.rows)
        else:
            record.layers(choice)

    for method in built.methods:
        method.on_select = note


def _check_checkpoint(checkpoint: Path, trainer: SiftTrainer) -> None:
    """Refuse a checkpoint of another run."""
    if isinstance(trainer, LayerTrainer):
        check_layers(checkpoint, trainer.about.layers, trainer.about.outside)
    else:
        check_adapter(checkpoint, trainer.model.peft_config["default"])


def _refuse_overwriting(recipe: Recipe, folder: RunFolder) -> None:
    if (other := folder.holds_other()) is not None:
        raise RecipeError(
            f"{folder.path} holds a {other} that is no run's, over which or beside which a run would write; give "
            "another folder with --out."
        )
    if not recipe.resume and not folder.is_fresh():
        raise RecipeError(f"{folder.path} holds a run already; give another folder with --out, or go on with --resume.")


def short_form(recipe: Recipe, prepared: Prepared, built: Built, folder: Path) -> str:
    """Say in a few lines what a run is about to do, and in which folder."""
    rows = len(prepared.data["train"])
    steps = planned_steps(built.trainer.args, rows)
    train, total = trainable(built)
    lines = [
        f"{recipe.model}: run folder {folder}",
        rows_line(recipe, prepared),
        f"{counted(train, 'parameter')} of {total:,} train, in {counted(built.depth, 'layer')}; "
        f"{steps_in_words(steps, recipe.batch_size * recipe.accumulate, rows)}",
    ]
    return "\n".join([*bad_lines(prepared, NAMED), *lines])
