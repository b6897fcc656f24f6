"""siftune's own training path: from a recipe to a run folder."""

import logging
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from siftune.base.environment import quiet, unsaid
from siftune.base.errors import TrainingError
from siftune.base.files import disk_faults, only_process
from siftune.base.ranks import from_first, join_launch, leave_launch, let_go, rank, world_size
from siftune.base.stages import stages, text_console
from siftune.base.text import counted
from siftune.data.target import sources
from siftune.methods.drivers.sample_choice import SampleChoice
from siftune.methods.host.callback import stand_first
from siftune.methods.host.spread import refuse_launched
from siftune.recipe.read import anchored, recipe_to_yaml
from siftune.recipe.schema import Recipe
from siftune.recipe.training_rows import BAD_ROWS, DROP_ROWS, Read, bad_row_lines
from siftune.recipe.training_rows import digest_of as digest_of_texts
from siftune.train.build import Built, build, trainable
from siftune.train.callbacks import EarlyStop, Metrics, ProgressView, RegularCheckpoints
from siftune.train.folder.checkpoints import best_in, step_of
from siftune.train.folder.run_folder import EVALS, HALVES, LOSSES, RECIPE, ROWS, RunFolder
from siftune.train.folder.saving import SourceNote
from siftune.train.folder.selections import SelectionRecord
from siftune.train.guards.memory import memory_faults
from siftune.train.guards.non_finite import BrokenSteps, refuse_broken_end
from siftune.train.guards.signals import Interrupts, held_back
from siftune.train.prepare import NAMED, bad_lines, rows_line, steps_text
from siftune.train.results import FollowedShares, Results
from siftune.train.resume import digest_of_tokens, find_checkpoint, has_ended, refuse_other_source
from siftune.train.session import Session, open_session, read_session, settled
from siftune.train.source import ModelSource, Source
from siftune.train.source_losses import SourceLosses
from siftune.train.trainer import SiftTrainer, planned_steps

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A finished training run."""

    folder: RunFolder
    model: nn.Module  # the tuned model, adapters attached
    tokenizer: PreTrainedTokenizerBase
    summary: dict[str, Any]  # steps, losses, seconds, tokens per second, peak memory in MB


def train(
    recipe: Recipe,
    console: Console | None = None,
    source_of: Callable[[str], Source] = ModelSource,
    read: Read | None = None,
) -> Run:
    """Fine-tune by a recipe.

    Args:
        recipe: Settings; checked and resolved here.
        console: Console for progress; stderr by default.
        source_of: Maps the recipe's `model` to its source; by default an ordinary model.
        read: Its rows, which are then not read again. None: read the files of the recipe.

    Raises:
        InputError: Recipe, data or model cannot be used. If training had begun, the run folder has the adapter after
            the last complete step.
    """
    console = console or text_console(stderr=True)
    refuse_launched()
    joined = join_launch()
    recipe, source = settled(recipe, source_of)
    folder = from_first(lambda: RunFolder(str(recipe.out)))
    first = rank() == 0
    console = console if first else Console(quiet=True)
    with ExitStack() as stack:
        if first:
            stack.enter_context(only_process(folder.path))
            stack.enter_context(folder.removed_on_failure())
        stack.enter_context(memory_faults(recipe))
        run = _train(recipe, source, folder, console, read)
    if joined:
        leave_launch()
    return run


def _train(recipe: Recipe, source: Source, folder: RunFolder, console: Console, read: Read | None) -> Run:
    """Train by a settled recipe into an existing folder."""
    checkpoint = _checkpoint(recipe, source, folder)
    folder.refuse_results(recipe.resume is not False)
    read = read_session(recipe, source, read)
    session = open_session(recipe, source, read, stages(console))
    rows, data = session.prepared.rows["train"], session.data

    callbacks = _Callbacks(session, folder.path, console)
    built = build(
        recipe,
        session.model,
        session.tokenizer,
        data,
        folder.checkpoints,
        callbacks.in_order,
        callbacks.broken,
        callbacks.on_select,
    )
    trainer = built.trainer
    source.check_tuned(trainer.model)
    _extend_log(built, session, folder)

    digest = digest_of_tokens(data["train"])
    ended = checkpoint is not None and has_ended(checkpoint, recipe, digest, trainer, folder)
    begun = 0 if checkpoint is None else step_of(checkpoint)
    recorded, copied = _with_own_list(anchored(replace(recipe, resume=False)), folder)
    console.print(_summary_lines(session, built, folder.path), markup=False)
    if rank() == 0:
        _write_start(folder, session, recorded, copied, digest)
        _drop_old_records(folder, begun, ended)

    def release() -> None:
        callbacks.view.close()
        built.release()
        callbacks.leave()

    fit = partial(_fit, trainer, callbacks.signals, checkpoint, ended, best=recipe.patience is not None)
    digest_of_rows = None if recipe.dp_epsilon is not None else digest_of_texts(rows)
    results = Results(trainer, folder, recorded, source, callbacks.followed, begun, digest_of_rows)
    summary = _run(results, fit, release)
    if world_size() > 1:
        let_go(trainer)
    return Run(folder, trainer.model, session.tokenizer, summary)


def _checkpoint(recipe: Recipe, source: Source, folder: RunFolder) -> Path | None:
    """Find the checkpoint to resume from, and remove incomplete ones; None for a new run."""
    if not recipe.resume:
        return None
    checkpoint = from_first(lambda: find_checkpoint(recipe, folder))
    from_first(folder.drop_half_written)  # so that no checkpoint is written into what a killed run left
    refuse_other_source(checkpoint, source.identity)
    return checkpoint


class _Callbacks:
    """Callbacks of a run besides its methods, and what they collect.

    Args:
        session: Settings and rows of the run.
        folder: The run folder.
        console: Console for progress.
    """

    def __init__(self, session: Session, folder: Path, console: Console) -> None:
        recipe, rows = session.recipe, session.prepared.rows["train"]
        self.view, self.signals = ProgressView(console), Interrupts()
        self.followed = FollowedShares(sources(rows))
        self._records = [SelectionRecord(folder, sources(rows))] if rank() == 0 else []
        saving = [] if recipe.save_every else [RegularCheckpoints()]
        stopping = [] if recipe.patience is None else [EarlyStop(recipe.patience)]
        note = SourceNote(session.source.identity)
        self.in_order = [self.view, *saving, *stopping, *self._records, note, self.signals]
        flags = [self.signals.flag, *(callback.flag for callback in saving)]
        self.broken = BrokenSteps(name=lambda row: rows[row].origin, flags=flags)
        # None on other ranks, since a method waits for the device if its choices are read at once
        self.on_select = self._record if rank() == 0 else None

    def _record(self, choice: Any) -> None:
        """Record a choice of layers or rows."""
        for record in self._records:
            if isinstance(choice, SampleChoice):
                assert choice.rows is not None  # siftune's own batches are numbered
                numbers = choice.rows.tolist()
                record.rows(choice, numbers)
                self.followed.add(choice, numbers)
            else:
                record.layers(choice)

    def leave(self) -> None:
        """Write the choices that are not written yet."""
        for record in self._records:
            record.leave()


def _extend_log(built: Built, session: Session, folder: RunFolder) -> None:
    """Have callbacks extend the lines of the log; trackers read these lines, so they come later."""
    trainer = built.trainer
    stand_first(trainer, Metrics(folder, built.active_layers, built.compiling))
    if session.recipe.dp_epsilon is None:  # no noise covers the losses of single rows
        stand_first(trainer, SourceLosses(trainer, session.prepared.rows))  # before the metrics, which write the line


def _with_own_list(recipe: Recipe, folder: RunFolder) -> tuple[Recipe, Path | None]:
    """A recipe with a copy of its list of rows in the run folder, and the list to copy; None for a list that is there.

    The list itself may be written again, as by another sifting.
    """
    if recipe.drop_rows is None or Path(recipe.drop_rows).resolve().is_relative_to(folder.path.resolve()):
        return recipe, None
    copied = Path(recipe.drop_rows)
    return replace(recipe, drop_rows=str(folder.path.absolute() / f"{DROP_ROWS}{copied.suffix}")), copied


def _write_start(folder: RunFolder, session: Session, recorded: Recipe, copied: Path | None, digest: str) -> None:
    """Write recipe, list of rows to leave out, bad rows and the digest of the tokenised rows."""
    if copied is not None:
        folder.write(f"{DROP_ROWS}{copied.suffix}", copied.read_text(encoding="utf-8-sig"))
    folder.write_lines(BAD_ROWS, [*bad_row_lines(session.prepared.bad)])
    folder.write(RECIPE, recipe_to_yaml(recorded))
    folder.write(ROWS, f"{digest}\n")


def _drop_old_records(folder: RunFolder, begun: int, ended: bool) -> None:
    """Remove records of an earlier training: those after the step `begun`, and its results unless it has `ended`."""
    if not ended:
        for name in (LOSSES, EVALS):
            folder.write_lines(name, [])
        shutil.rmtree(folder.path / HALVES, ignore_errors=True)
    folder.cut_records(begun)  # of a run that ended before its next checkpoint


def _fit(trainer: SiftTrainer, signals: Interrupts, checkpoint: Path | None, ended: bool, best: bool) -> None:
    """Train to the end, or load a checkpoint that is the end already: its `best` weights on request.

    Raises:
        KeyboardInterrupt: A signal arrived.
        TrainingError: Training failed.
    """
    if ended and checkpoint is not None:
        trainer.take(checkpoint, best)
    else:
        # the Trainer warns if the best checkpoint is in another folder, and compares arguments that siftune has checked
        moved = checkpoint is not None and best_in(Path(trainer.args.output_dir), checkpoint) is not None
        no_warning = unsaid("transformers.trainer", "The best checkpoint") if moved else nullcontext()
        with signals.listening(), quiet("transformers.trainer_utils"), no_warning:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if signals.came:
        raise KeyboardInterrupt
    if trainer.kept_step is None:
        refuse_broken_end(trainer.state)


def _run(results: Results, fit: Callable[[], None], release: Callable[[], None]) -> dict[str, Any]:
    """Train, restore the model, and write weights, model card and summary however training ends."""
    trainer, folder = results.trainer, results.folder
    started = time.monotonic()
    status = "interrupted"
    try:
        with disk_faults(folder.path), memory_faults(results.recipe):
            fit()
        status = "finished"
    except KeyboardInterrupt as stop:
        stop.add_note(results.text())
        raise
    except TrainingError as error:
        status = "stopped"
        raise type(error)(f"{error}; so far, {results.text()}") from error
    finally:
        with held_back() as signals:
            returned = results.returned() if trainer.is_world_process_zero() else {}
            release()
            summary = results.summary(time.monotonic() - started)
            if trainer.is_world_process_zero() and (status == "finished" or trainer.state.global_step > 0):
                folder.drop_half_written()
                results.write(status, summary, returned)
    if signals:
        raise KeyboardInterrupt
    return summary


def _summary_lines(session: Session, built: Built, folder: Path) -> str:
    """Run folder, rows, trainable parameters and steps."""
    recipe, prepared, rows = session.recipe, session.prepared, len(session.data["train"])
    args = built.trainer.args
    steps = planned_steps(args, rows)
    if args.get_warmup_steps(steps) >= steps:
        logger.warning("all steps are warm-up, the first of them at learning rate 0: give more steps, or warmup 0")
    train, total = trainable(built)
    lines = [
        f"{recipe.model}: run folder {folder}",
        rows_line(recipe, prepared),
        f"{counted(train, 'parameter')} of {total:,} train, in {counted(built.depth, 'layer')}; "
        f"{steps_text(steps, recipe.batch_size * recipe.accumulate, rows)}",
    ]
    return "\n".join([*bad_lines(prepared, NAMED), *lines])
