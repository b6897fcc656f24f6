"""Sift a pool of training rows by a few rows of the target task, by bad rows, or by both.

FOLDER/
  sift.json        the settings and digests of rows that results depend on; later also counts and seconds
  similar.jsonl    a line: the similarity of the prompts of the pool, and of the target, to those of the target
  seen.jsonl, unseen.jsonl  the rows of the target that the training takes and that it leaves out
  pool/, tuning/   run folders of the training on rows of the task, and of that on the target, which continues it
  losses.jsonl     a line for every 512 rows of the task: their numbers, and their losses after that training
  1-…, tuning-1/   the same of a second training, which a small target has
  scores.csv       every row of the pool with its score, without copies: a decision file (data/decisions.py)
  avoid/           the same of the bad rows, and `pool/`, run folder of the training on the pool that precedes theirs
  dropped.csv      the same of the rows that were not selected, with copies; missing if there are none
  sifted.jsonl     the selected rows as they are in the pool, for any trainer

An interrupted call continues: a training from its last checkpoint, the losses after the last line. If all losses are
there, no model is loaded. Another share or other limits need further losses only if they reach rows without any.
"""

import hashlib
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from siftune.base.environment import launch_rank
from siftune.base.errors import AdapterError, DataError, RecipeError
from siftune.base.files import only_process
from siftune.base.ranks import (
    first_rank_first,
    from_first,
    in_launch,
    rank,
    wait_for_all,
)
from siftune.base.stages import stages, text_console
from siftune.base.work_folder import WorkFolder
from siftune.data.rows import Row
from siftune.data.target import source_or_file
from siftune.recipe.checks import check
from siftune.recipe.schema import SCORING, Recipe, method_of, new_folder, resolve_recipe
from siftune.recipe.training_rows import Read, ReadOnce, digest_of, read_rows
from siftune.sifting.checks import RECORD, STEPS, check_sifting
from siftune.sifting.choose import NO_LIMITS, Floats, Limits
from siftune.sifting.files import DROPPED, SIFTED, copied_records, replace_scores, write_dropped, write_selected
from siftune.sifting.pool import PARTS, Rows, compared, count_of, read_all
from siftune.sifting.scoring import choose_by_bad_rows, choose_by_target
from siftune.sifting.tuning import AVOID, POOL, from_run, prefix
from siftune.sifting.work import LOSSES, PROMPTS, SIMILAR, TUNING, Work
from siftune.train.folder.run_folder import SIFT, RunFolder
from siftune.train.prepare import NAMED, Prepared, bad_lines, prepare
from siftune.train.resume import find_checkpoint
from siftune.train.source import ModelSource, Source

SCORES = "scores.csv"
TEMPLATE = "template.jinja"  # a copy of the file, if the recipe names one


@dataclass(frozen=True, repr=False)
class Sifted:
    """A sifted pool.

    Attributes:
        folder: The folder with its files.
        selected: Numbers of the selected rows among all rows of the pool, from 0, ascending, for `Dataset.select`.
        places: (R,) places of the rows that have scores, such as "pool.jsonl:17"; not of copies, target and bad rows.
        scores: (R,) float64: the lower, the better a row's answer fits, as in choose.py: its margin over other answers
            if rows share these, otherwise its loss. NaN for rows of other tasks, and for rows that cannot be compared;
            None without a target. Rounded, as in scores.csv.
        similar: (R,) float64: similarity of the prompts to those of the target, from -1 to 1. None without a target.
            Rounded, as in scores.csv.
        score_limit: The highest score by which rows were selected; None if scores were not limited.
        similarity_limit: The lowest similarity of their prompts; None without a target or with a share.
        bad_scores: (R,) float64: loss after a training on the bad rows minus loss before, in nats per label token. None
            without them.
        shares: Selected share of each source's rows; a source is the column `source`, or the file.
        completions: Selected share of the task's rows with each completion, if these are few; otherwise empty.
        reason: Why these rows were selected, as a clause.
        notes: Sentences on unusable rows, copies, and rows of the target in the pool.
        seconds: Time that sifting took, without that of calls that were interrupted.
    """

    folder: Path
    selected: Sequence[int]
    places: Sequence[str]
    scores: Floats | None
    similar: Floats | None
    score_limit: float | None
    similarity_limit: float | None
    bad_scores: Floats | None
    shares: Mapping[str, float]
    completions: Mapping[str, float]
    reason: str
    notes: Sequence[str]
    seconds: float

    def __repr__(self) -> str:
        return (
            f"Sifted(folder={str(self.folder)!r}, selected={len(self.selected):,} of {len(self.places):,} rows, "
            f"reason={self.reason!r})"
        )

    @property
    def rows(self) -> Path:
        """JSONL file of the selected rows, for any trainer."""
        return self.folder / SIFTED

    @property
    def dropped(self) -> Path | None:
        """Decision file of the other rows, for the recipe's `drop_rows`; None if there are none."""
        path = self.folder / DROPPED
        return path if path.exists() else None

    @property
    def adapter(self) -> Path | None:
        """LoRA in PEFT's format that was tuned to score rows, to continue training from; None without a target."""
        path = RunFolder(self.folder / TUNING, create=False).adapter
        return path if path.exists() else None


def sift(
    train: str | Path | Sequence[str | Path],
    target: str | Path | None = None,
    share: float | int | None = None,
    steps: int = STEPS,
    avoid: str | Path | None = None,
    max_score: float | None = None,
    min_similarity: float | None = None,
    console: Console | None = None,
    source_of: Callable[[str], Source] = ModelSource,
    **settings: Any,
) -> Sifted:
    """Select the rows of a pool that are like a few rows of a target, and unlike bad rows (ours; choose.py).

    Rows with prompts like those of the target are of its task: see `task_limit`. The model is tuned on most of
    the target's rows, as long as the loss of the others falls. If the rows share a few answers, it is tuned on the
    task's rows first, and rows are left out to whose prompts another answer fits better: see `choose_by_margins`.
    Otherwise those are left out whose loss is above that of four in five of the target's other rows, and of one in ten
    of their prompts with other completions: see `choose_by_losses`. Rows like the bad ones are left out after a model
    tuned on the pool is tuned further on them: see `unlike`.

    Args:
        train: The pool: a file or hub id, or several.
        target: File or hub id of at least 8 correct rows of the task. None: rows are only left out by the bad ones.
        share: Share of the pool to select, below 1, or a number of rows: the lowest scores, then rows of other tasks by
            the similarity of their prompts. None: rows of the task that do not contradict the target.
        steps: Optimizer steps of a training on the pool, at most; on the target's rows, at most half as many follow.
        avoid: File or hub id of at least 8 rows with answers that the model must not give.
        max_score: Select rows of the task up to this score. None: if rows share answers, 1, and two in five rows of
            each of the target's answers in any case; otherwise the limit of `choose_by_losses`.
        min_similarity: Rows are of the task from this similarity of their prompts, -1 to 1. None: the limit of the
            target's own prompts. If the folder lacks losses of such rows, only these are computed.
        console: Console for progress; stderr by default.
        source_of: Maps the setting `model` to its source, as for `siftune.train.run.train`.
        settings: Further settings of a recipe. `out` is the folder, by default runs/DATE-sift. Model, columns, template
            and maximum length should be those of the training that follows.

    Raises:
        InputError: A setting, the rows or the model cannot be used.

    Example:
        >>> sifted = sift("pool.jsonl", "few.jsonl", share=0.5, model="base", template="none", out="runs/sift")
        >>> dataset = load_dataset("json", data_files=str(sifted.rows), split="train")
        >>> pool = load_dataset("json", data_files="pool.jsonl", split="train")
        >>> pool.select(sifted.selected).to_list() == dataset.to_list()
        True
    """
    pool = str(train) if isinstance(train, str | Path) else tuple(map(str, train))
    named = {"target": None if target is None else str(target)}
    recipe = Recipe(**{**settings, "train": pool, **named})
    asked = Asked(None if avoid is None else str(avoid), share, steps, Limits(max_score, min_similarity))
    check_sifting(recipe, share, asked.avoid, asked.limits)
    if steps < 1:
        raise RecipeError(f"steps is {steps}, but must be at least 1")
    return sift_pool(recipe, asked, console, source_of, ReadOnce())


class Asked(NamedTuple):
    """Settings of a sifting that are not those of a recipe, as for `sift`."""

    avoid: str | None
    share: float | int | None
    steps: int
    limits: Limits = NO_LIMITS


def sift_pool(
    recipe: Recipe,
    asked: Asked,
    console: Console | None,
    source_of: Callable[[str], Source],
    reader: ReadOnce,
) -> Sifted:
    """Sift the pool of a recipe, of a command or of a training.

    Args:
        recipe: The recipe; `out` is the folder, or None.
        asked: What only a sifting is asked for.
        console: As for `sift`.
        source_of: As for `sift`.
        reader: Reads files; one that the training reads again is read once.

    Raises:
        InputError: As `sift`.
    """
    with in_launch(), ExitStack() as stack:
        console = console or text_console(stderr=True)
        console = Console(quiet=True) if rank() else console
        # not by `settled`: the recipe is checked already, and has options of a method that is not run here
        recipe = from_first(lambda: _dense(recipe))
        source = source_of(recipe.model)
        recipe = source.settle(recipe)
        # not by `read_session` and `open_session`: bad rows of all files are reported together, and the model is loaded
        # later, if losses are missing
        # where answers are compared, prompts and earlier answers of a conversation have no labels
        scored = replace(recipe, completion_only=recipe.completion_only or recipe.target is not None)
        rows = read_all(scored, asked.avoid, source, reader)
        with first_rank_first(), stages(console) as progress:
            parts = {"train": rows.pool, **{PARTS[few.name]: few.rows for few in rows.few}}
            read = Read({name: compared(recipe, part) for name, part in parts.items()}, rows.bad)
            prepared = prepare(replace(scored, target=None), source.tokenizer(), read, progress)
        count = count_of(asked.share, len(prepared.rows["train"]))
        folder = WorkFolder(
            str(recipe.out), RECORD, f"{TUNING}*/checkpoints/*", f"{POOL}/checkpoints/*", LOSSES, SIMILAR, PROMPTS
        )
        records = None
        if rank() == 0:
            stack.enter_context(folder.begin(_facts(recipe, rows, asked.steps, source.identity)))
            records = stack.enter_context(copied_records(recipe, rows.pool, folder.path))
        if isinstance(recipe.template, Path):  # a training that continues compares the path, not the content
            recipe = replace(recipe, template=from_first(partial(_own_template, folder, recipe.template)))
        try:
            work = Work(recipe, rows, asked.steps, folder, console, source_of, records)
            return _selected(work, prepared, count, asked.limits)
        except KeyboardInterrupt as stop:
            # not that of the training on the target's rows
            stop.__notes__ = [_continues_with(folder.path)]
            raise


def sift_first(
    recipe: Recipe,
    share: float | int | None,
    console: Console,
    source_of: Callable[[str], Source] = ModelSource,
    avoid: str | None = None,
    by_target: bool = True,
) -> tuple[Recipe, Sifted, Read]:
    """Sift the pool of a recipe into the folder `sift` of its run, whose training continues with that of the sifting.

    Args:
        recipe: The recipe.
        share: As for `sift`.
        console: As for `sift`.
        source_of: As for `sift`.
        avoid: As for `sift`.
        by_target: Whether the recipe's target sifts too.

    Returns:
        The recipe without the rows that were not selected and with the adapter to continue with; the sifted pool; and
        the rows of the recipe as they were when the pool was read. If the run was interrupted while sifting, the recipe
        does not resume, since there is nothing to resume.

    Raises:
        InputError: As `sift`, or the recipe cannot be used, or its folder holds a run.
    """
    check(recipe)  # `siftune train` has done so before torch is imported; other callers need not
    check_sifting(recipe, share, avoid)
    recipe = replace(recipe, out=from_first(lambda: resolve_recipe(recipe).out))
    folder = from_first(lambda: RunFolder(str(recipe.out)))
    reader = ReadOnce()
    with ExitStack() as stack:
        if not launch_rank():
            stack.enter_context(only_process(folder.path))
            stack.enter_context(folder.removed_on_failure())
        if recipe.resume is True and folder.is_fresh() and (folder.path / SIFT / RECORD).exists():
            recipe = replace(recipe, resume=False)
        elif recipe.resume:
            from_first(lambda: find_checkpoint(recipe, folder))
        folder.refuse_results(recipe.resume is not False)
        pool = replace(recipe, out=str(folder.path / SIFT), steps=Recipe.steps)
        if not by_target:
            pool = replace(pool, target=None)
        try:
            sifted = sift_pool(pool, Asked(avoid, share, STEPS), console, source_of, reader)
        except KeyboardInterrupt as stop:
            stop.__notes__ = [_continues_with(folder.path)]
            raise
        if sifted.dropped is not None:
            recipe = replace(recipe, drop_rows=str(sifted.dropped))
        if pool.target is not None and _continues(recipe):
            recipe = replace(recipe, **from_first(partial(_tuned, sifted)))
        return recipe, sifted, read_rows(resolve_recipe(recipe), reader)


def _continues_with(folder: Path) -> str:
    return f"the same command with --out {shlex.quote(str(folder))} continues"


def _continues(recipe: Recipe) -> bool:
    """Whether a training can continue with the adapter of its sifting: LoRA without dropout, from the base (ours).

    That adapter has learned the task already, from the pool and from the target, so that fewer steps remain. With
    `keep` the training begins with the base, from which it must not depart.
    """
    return recipe.adapter == "lora" and not recipe.dropout and recipe.from_adapter is None and recipe.keep is None


def _tuned(sifted: Sifted) -> dict[str, Any]:
    """Settings that continue with the adapter of a sifting.

    Raises:
        AdapterError: It is gone, or its weights have changed.
    """
    run = RunFolder(sifted.folder / TUNING, create=False)
    if sifted.adapter is None or run.changed_weights():
        raise AdapterError(
            f"{run.adapter} is not what was trained, or is gone: remove {sifted.folder}, and run the command again"
        )
    return from_run(run.path)


def _dense(recipe: Recipe) -> Recipe:
    """The recipe with the method of the trainings: LoRA on all rows."""
    if recipe.adapter != "lora":  # rank, alpha, targets and rate are those of another adapter
        recipe = replace(recipe, adapter="lora", rank=None, alpha=None, targets=None, lr=None)
    if method_of(recipe).lr != method_of(Recipe()).lr:
        recipe = replace(recipe, lr=None)
    recipe = replace(recipe, method="dense", target_share=0.0, target_last=None)
    return resolve_recipe(replace(recipe, out=recipe.out or new_folder("sift")))


def _own_template(folder: WorkFolder, file: Path) -> Path:
    """A copy of a chat template in the folder."""
    folder.write(TEMPLATE, file.read_text(encoding="utf-8"))
    return folder.path / TEMPLATE


def _facts(recipe: Recipe, rows: Rows, steps: int, identity: Mapping[str, str]) -> dict[str, Any]:
    settings = {name: getattr(recipe, name) for name in SCORING}
    if isinstance(recipe.template, Path):  # the content decides, not the place
        settings["template"] = hashlib.sha256(recipe.template.read_bytes()).hexdigest()
    digests = {"the pool": digest_of(rows.pool), **{few.title: digest_of(few.rows) for few in rows.few}}
    return {**settings, "steps": steps, **digests, **identity}


def _selected(work: Work, prepared: Prepared, count: int | None, limits: Limits) -> Sifted:
    """Score the pool, select rows, and write the files."""
    started, rows = time.monotonic(), prepared.rows["train"]
    parts = {
        few.name: choose_by_target(work, prepared, few, count, limits)
        if few.name == "target"
        else choose_by_bad_rows(work, prepared, few)
        for few in work.rows.few
    }
    selected_R = np.logical_and.reduce([part.choice.rows_R for part in parts.values()])
    if not selected_R.any():
        raise DataError("each row of the pool that is like the target is like the bad rows too: give other bad rows")
    for few in work.rows.few:
        part = parts[few.name]
        remaining_R = selected_R if few.name == "target" else part.choice.rows_R
        file = f"{prefix(few)}{SCORES}"
        from_first(partial(replace_scores, work, file, rows, remaining_R, part.columns, work.rows.bad_in_pool))
    from_first(partial(write_dropped, work, rows, selected_R, next(iter(parts.values())).columns))
    numbers = from_first(partial(write_selected, work, {rows[at].origin for at in selected_R.nonzero()[0]}))
    earlier = from_first(lambda: float(work.folder.state.get("seconds", 0)))
    seconds = round(earlier + time.monotonic() - started, 1)
    reason = "; ".join(part.choice.reason for part in parts.values())
    limits = parts["target"].limits if "target" in parts else NO_LIMITS
    if rank() == 0:
        counts = {"selected": int(selected_R.sum()), "pool": len(rows)}
        of_limits = {"score_limit": limits.score, "similarity_limit": limits.similarity}
        work.folder.set_state(seconds=seconds, **counts, **of_limits, reason=reason)
    wait_for_all()
    by_target, by_bad = (parts[name].columns if name in parts else {} for name in ("target", AVOID))
    return Sifted(
        folder=work.folder.path,
        selected=numbers,
        places=[row.origin for row in rows],
        scores=by_target.get("score"),
        similar=by_target.get("similarity"),
        score_limit=limits.score,
        similarity_limit=limits.similarity,
        bad_scores=by_bad.get("score"),
        shares=_shares(source_or_file(rows), selected_R),
        completions=_completions(rows, selected_R, by_target.get("score")),
        reason=reason,
        notes=[*bad_lines(prepared, NAMED), *work.rows.notes()],
        seconds=seconds,
    )


def _shares(sources: Sequence[str], selected_R: NDArray[np.bool_]) -> dict[str, float]:
    """Selected share of the rows of each source."""
    names_R = np.array(sources)
    return {source: float(selected_R[names_R == source].mean()) for source in dict.fromkeys(sources)}


_FEW = 50  # completions that are reported one by one


def _completions(rows: Sequence[Row], selected_R: NDArray[np.bool_], scores_R: Floats | None) -> dict[str, float]:
    """Selected share of the task's rows with each completion, if these are few."""
    task = [] if scores_R is None else np.isfinite(scores_R).nonzero()[0].tolist()
    texts = [rows[number].completion.strip() for number in task]
    return _shares(texts, selected_R[task]) if 1 < len(set(texts)) <= min(_FEW, len(task) // 4) else {}
