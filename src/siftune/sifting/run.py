"""Sift a pool of training rows by a few rows of the target task, by bad rows, or by both.

FOLDER/
  sift.json        the settings and digests of rows that results depend on; later also counts and seconds
  unseen.csv       the rows of the target that the training leaves out
  tuning/          run folder of the training on the other rows of the target
  losses.jsonl     a line for every 512 rows: their losses after that training and before
  similar.jsonl    a line: the similarity of the prompts of the pool, and of the unseen rows, to those of the other rows
  scores.csv       every row of the pool: place, score, both losses, similarity, whether it was selected, and the start
                   of its text
  avoid/           the same of the bad rows, and `pool/`, run folder of the training on the pool that precedes theirs
  dropped.csv      the rows that were not selected, for `siftune train --drop-rows`; missing if there are none
  sifted.jsonl     the selected rows as they are in the pool, for any trainer

An interrupted call continues: a training from its last checkpoint, the losses after the last line. If all losses are
there, no model is loaded.
"""

import csv
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from rich.console import Console

from siftune.base.environment import launch_rank
from siftune.base.errors import DataError, TrainingError
from siftune.base.files import only_process
from siftune.base.stages import stages
from siftune.base.text import counted, inert
from siftune.base.work_folder import WorkFolder
from siftune.data.read import placed_records
from siftune.data.rows import Row
from siftune.data.target import sources
from siftune.engine.ranks import (
    first_rank_first,
    from_first,
    in_launch,
    mean_over_ranks,
    rank,
    wait_for_all,
    world_size,
)
from siftune.evaluate.likelihood import row_nll
from siftune.models.adapters.attach import load_adapter
from siftune.models.attention import short_rows
from siftune.models.load import use_attention
from siftune.models.modules import model_device
from siftune.recipe.checks import check
from siftune.recipe.schema import Recipe, method_of, new_folder, resolve_recipe, train_files
from siftune.records.rows import Read, absolute_place, digest_of, text_of
from siftune.sifting.rows import PARTS, Few, Rows, check_sifting, count_of, read_all
from siftune.sifting.scores import Choice, Floats, choose, lowest, of_task, scores, unlike
from siftune.sifting.similarity import embed, nearest, prompt_of
from siftune.train.folder.run import RunFolder
from siftune.train.guards.memory import free
from siftune.train.prepare import NAMED, ModelSource, Prepared, Source, bad_lines, prepare
from siftune.train.resume import find_checkpoint
from siftune.train.run import train as tune

STEPS = 60  # of the training on the target's rows (ours: docs/sifting.md)
FOLDER = "sift"  # of a run folder
SCORES, DROPPED, SIFTED, RECORD = "scores.csv", "dropped.csv", "sifted.jsonl", "sift.json"
_LOSSES, _SIMILAR, _UNSEEN, _TUNING = "losses.jsonl", "similar.jsonl", "unseen.csv", "tuning"
_POOL, _OTHERS = "pool", "others.csv"  # of the bad rows' folder: the training on the pool, and rows that it leaves out
_FURTHER = 20  # steps on the bad rows, after those on the pool (ours)
_CHUNK = 512  # rows in a line of losses.jsonl
_SHOWN = 300  # characters of a text in scores.csv
_WIDER = 4  # times the rows of a training step in a forward pass
# settings of the trainings: those of the training that follows
_SAME = (
    *("model", "dtype", "quantize", "attention", "train_split", "columns", "template", "max_length", "completion_only"),
    *("bad_rows", "rank", "alpha", "targets", "layers", "lr", "batch_size", "accumulate", "checkpointing", "seed"),
)


@dataclass(frozen=True)
class Sifted:
    """A sifted pool.

    Attributes:
        folder: The folder with its files.
        selected: Numbers of the selected rows among all rows of the pool, from 0, ascending, for `Dataset.select`.
        places: (R,) places of the rows that have scores, such as "pool.jsonl:17"; not of target and bad rows.
        scores: (R,) float64: loss after training on the target minus loss before, in nats per label token. The lower,
            the more a row is like the target. None without a target.
        similar: (R,) float64: similarity of the prompts to those of the target, from -1 to 1. None without a target.
        bad_scores: (R,) float64: the same of the bad rows. None without them.
        reason: Why these rows were selected, as a clause.
        notes: Sentences on unusable rows, copies, and rows of the target in the pool.
        seconds: Time that sifting took, without that of calls that were interrupted.
    """

    folder: Path
    selected: Sequence[int]
    places: Sequence[str]
    scores: Floats | None
    similar: Floats | None
    bad_scores: Floats | None
    reason: str
    notes: Sequence[str]
    seconds: float

    @property
    def rows(self) -> Path:
        """JSONL file of the selected rows, for any trainer."""
        return self.folder / SIFTED

    @property
    def dropped(self) -> Path | None:
        """CSV file of the other rows, for the recipe's `drop_rows`; None if there are none."""
        path = self.folder / DROPPED
        return path if path.exists() else None


def sift(
    train: str | Path | Sequence[str | Path],
    target: str | Path | None = None,
    share: float | int | None = None,
    steps: int = STEPS,
    avoid: str | Path | None = None,
    console: Console | None = None,
    source_of: Callable[[str], Source] = ModelSource,
    **settings: Any,
) -> Sifted:
    """Select the rows of a pool that are like a few rows of a target, and unlike bad rows (ours; scores.py).

    Rows with prompts like those of the target are of its task: see `of_task`. The model is tuned on most of the
    target's rows. A row's score is the change of its loss, and rows of the task with a score below 0 are selected. The
    scores of the target's other rows show whether to trust this: see `choose`. Rows like the bad ones are left out in
    the same way, after a model tuned on the pool is tuned further on them: see `unlike`.

    Args:
        train: The pool: a file or hub id, or several.
        target: File or hub id of at least 8 correct rows of the task. None: rows are only left out by the bad ones.
        share: Share of the pool to select, below 1, or a number of rows: the lowest scores, of rows of the task before
            others. None: rows of the task that do not contradict the target.
        steps: Optimizer steps of the training on the target's rows, and of that on the pool before the bad rows.
        avoid: File or hub id of at least 8 rows with answers that the model must not give.
        console: Console for progress; stderr by default.
        source_of: Maps the setting `model` to its source, as for `siftune.train.run.train`.
        settings: Further settings of a recipe. `out` is the folder, by default runs/DATE-sift. Model, columns, template
            and maximum length should be those of the training that follows.

    Raises:
        InputError: A setting, the rows or the model cannot be used.

    Example:
        >>> sifted = sift("pool.jsonl", "few.jsonl", share=0.5, model="base", template="none", out="runs/sifted")
        >>> dataset = load_dataset("json", data_files=str(sifted.rows), split="train")
        >>> pool = load_dataset("json", data_files="pool.jsonl", split="train")
        >>> pool.select(sifted.selected).to_list() == dataset.to_list()
        True
    """
    pool = str(train) if isinstance(train, str | Path) else tuple(map(str, train))
    named = {"target": None if target is None else str(target)}
    recipe = Recipe(**{**settings, "train": pool, **named})
    bad = None if avoid is None else str(avoid)
    check_sifting(recipe, share, bad)
    with in_launch(), ExitStack() as stack:
        console = Console(quiet=True) if rank() else console or Console(stderr=True, highlight=False, soft_wrap=True)
        recipe = from_first(lambda: _dense(recipe))
        source = source_of(recipe.model)
        recipe = source.settle(recipe)
        rows = read_all(recipe, bad, source)
        with first_rank_first(), stages(console) as progress:
            parts = Read({"train": rows.pool, **{PARTS[few.name]: few.rows for few in rows.few}}, rows.bad)
            prepared = prepare(replace(recipe, target=None), source.tokenizer(), parts, progress)
        count = count_of(share, len(prepared.rows["train"]))
        folder = WorkFolder(
            str(recipe.out), RECORD, f"{_TUNING}/checkpoints/*", f"{_POOL}/checkpoints/*", _LOSSES, _SIMILAR
        )
        if rank() == 0:
            stack.enter_context(folder.begin(_facts(recipe, rows, steps, source.identity)))
            stack.enter_context(only_process(folder.path))
        try:
            return _sift(_Work(recipe, rows, steps, folder, console, source_of), prepared, count)
        except KeyboardInterrupt as stop:
            stop.__notes__ = ["the same command continues"]  # not that of the training on the target's rows
            raise


def sift_first(
    recipe: Recipe,
    share: float | int | None,
    console: Console,
    source_of: Callable[[str], Source] = ModelSource,
    avoid: str | None = None,
    by_target: bool = True,
) -> tuple[Recipe, Sifted]:
    """Sift the pool of a recipe into the folder `sift` of its run.

    Args:
        recipe: The recipe.
        share: As for `sift`.
        console: As for `sift`.
        source_of: As for `sift`.
        avoid: As for `sift`.
        by_target: Whether the recipe's target sifts too.

    Returns:
        The recipe without the rows that were not selected, and the sifted pool. If the run was interrupted while
        sifting, the recipe does not resume, since there is nothing to resume.

    Raises:
        InputError: As `sift`, or the recipe cannot be used, or its folder holds a run.
    """
    check(recipe)
    check_sifting(recipe, share, avoid)
    recipe = replace(recipe, out=from_first(lambda: resolve_recipe(recipe).out))
    folder = from_first(lambda: RunFolder(str(recipe.out)))
    with nullcontext() if launch_rank() else folder.removed_on_failure():
        if recipe.resume is True and folder.is_fresh() and (folder.path / FOLDER / RECORD).exists():
            recipe = replace(recipe, resume=False)
        elif recipe.resume:
            from_first(lambda: find_checkpoint(recipe, folder))
        folder.refuse_results(recipe.resume is not False)
        settings = {field.name: getattr(recipe, field.name) for field in fields(Recipe) if field.name != "steps"}
        settings["out"] = str(folder.path / FOLDER)
        if not by_target:
            settings["target"] = None
        sifted = sift(**settings, share=share, avoid=avoid, console=console, source_of=source_of)
    return recipe if sifted.dropped is None else replace(recipe, drop_rows=str(sifted.dropped)), sifted


@dataclass(frozen=True)
class _Work:
    recipe: Recipe
    rows: Rows
    steps: int
    folder: WorkFolder
    console: Console
    source_of: Callable[[str], Source]


def _dense(recipe: Recipe) -> Recipe:
    """The recipe with the method of the trainings: LoRA on all rows."""
    if recipe.adapter != "lora":  # rank, alpha, targets and rate are those of another adapter
        recipe = replace(recipe, adapter="lora", rank=None, alpha=None, targets=None, lr=None)
    if method_of(recipe).lr != method_of(Recipe()).lr:
        recipe = replace(recipe, lr=None)
    recipe = replace(recipe, method="dense", target_share=0.0, target_last=None)
    return resolve_recipe(replace(recipe, out=recipe.out or new_folder("sift")))


def _facts(recipe: Recipe, rows: Rows, steps: int, identity: Mapping[str, str]) -> dict[str, Any]:
    settings = {name: getattr(recipe, name) for name in _SAME}
    digests = {"the pool": digest_of(rows.pool), **{few.title: digest_of(few.rows) for few in rows.few}}
    return {**settings, "steps": steps, **digests, **identity}


def _sift(work: _Work, prepared: Prepared, count: int | None) -> Sifted:
    started, rows = time.monotonic(), prepared.rows["train"]
    parts = {few.name: _choose(work, prepared, few, count) for few in work.rows.few}
    selected_R = np.logical_and.reduce([part.choice.rows_R for part in parts.values()])
    if not selected_R.any():
        raise DataError("each row of the pool that is like the target is like the bad rows too: give other bad rows")
    for few in work.rows.few:
        part = parts[few.name]
        remaining_R = selected_R if few.name == "target" else part.choice.rows_R
        from_first(partial(_write_scores, work, few, rows, remaining_R, part.columns))
    numbers = from_first(lambda: _write(work, rows, set(selected_R.nonzero()[0].tolist())))
    earlier = from_first(lambda: float(work.folder.state.get("seconds", 0)))
    seconds = round(earlier + time.monotonic() - started, 1)
    reason = "; ".join(part.choice.reason for part in parts.values())
    if rank() == 0:
        work.folder.set_state(seconds=seconds, selected=int(selected_R.sum()), pool=len(rows), reason=reason)
    wait_for_all()
    by_target, by_bad = (parts[name].columns if name in parts else {} for name in ("target", "avoid"))
    return Sifted(
        folder=work.folder.path,
        selected=numbers,
        places=[row.origin for row in rows],
        scores=by_target.get("score"),
        similar=by_target.get("similarity"),
        bad_scores=by_bad.get("score"),
        reason=reason,
        notes=[*bad_lines(prepared, NAMED), *work.rows.notes()],
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Part:
    choice: Choice  # by the target, or by the bad rows
    columns: Mapping[str, Floats]  # of its scores.csv, each (R,)


def _choose(work: _Work, prepared: Prepared, few: Few, count: int | None) -> _Part:
    """Score the pool by the target, or by the bad rows, and choose."""
    rows, own_rows = prepared.rows["train"], prepared.rows[PARTS[few.name]]
    pool, own = (prepared.data[name].select_columns(["input_ids", "labels"]) for name in ("train", PARTS[few.name]))
    unseen = {row.origin for row in few.unseen}
    aside = [number for number, row in enumerate(own_rows) if row.origin in unseen]
    held_out, seen = own.select(aside), own.select(sorted({*range(len(own_rows))} - {*aside}))
    model = cache(partial(_tuned, work, few))  # loaded at most once, and only if something is missing
    after, before = _losses(work, few, concatenate_datasets([pool, held_out]), model)
    all_R = scores(after, before)
    if not np.isfinite(all_R).all():
        broken = [*rows, *(own_rows[number] for number in aside)][int(np.isfinite(all_R).argmin())]
        raise DataError(f"the loss of {broken.origin} is not finite: leave the row out, or give --dtype float32")
    score_R, few_T = all_R[: len(rows)], all_R[len(rows) :]
    columns = {"score": score_R, "loss_after": after[: len(rows)], "loss_before": before[: len(rows)]}
    if few.name == "avoid":
        choice = unlike(score_R, few_T)
    else:
        columns["similarity"], similar_T = _similar(work, pool, held_out, seen, model)
        task_R = of_task(columns["similarity"], similar_T)
        choice = choose(score_R, few_T, task_R)
        if count is not None:
            choice = Choice(lowest(score_R, count, task_R), "those with the lowest scores, as many as asked for")
        if not choice.rows_R.any():
            raise DataError(
                f"no row of the pool is like those of {few.file}: give a pool with rows of the task, or a share"
            )
    del model
    free()
    return _Part(choice, columns)


def _losses(work: _Work, few: Few, data: Dataset, tuned: Callable[[], Any]) -> tuple[Floats, Floats]:
    """Losses of rows after the training on `few` and before it, in nats per label token; each (rows,) float64."""
    name = f"{_prefix(few)}{_LOSSES}"
    done = from_first(lambda: {line["start"]: line for line in work.folder.lines(name)})
    starts = range(0, len(data), _CHUNK)
    batch = _WIDER * work.recipe.batch_size
    with stages(work.console) as progress:
        for start in starts:
            if start in done:
                continue
            model = tuned()
            progress("losses of the rows", start, len(data))
            chunk = data[start : start + _CHUNK]
            own = slice(rank(), None, world_size())  # each rank has a part of the chunk
            rows = list(zip(chunk["input_ids"][own], chunk["labels"][own], strict=True))
            part = torch.zeros(2, len(chunk["labels"]), dtype=torch.float64)
            with short_rows():
                results = [row_nll(model, rows, batch)]
                with _earlier(model):
                    results.append(row_nll(model, rows, batch))
            for place, result in enumerate(results):
                part[place, own] = torch.from_numpy(result.nll / np.maximum(result.tokens, 1))
            after, before = (mean_over_ranks(part, model_device(model)) * world_size()).tolist()
            done[start] = {"start": start, "after": after, "before": before}
            if rank() == 0:
                work.folder.append(name, done[start])
    after_R, before_R = (np.concatenate([done[start][name] for start in starts]) for name in ("after", "before"))
    return after_R, before_R


def _similar(
    work: _Work, pool: Dataset, held_out: Dataset, seen: Dataset, tuned: Callable[[], Any]
) -> tuple[Floats, Floats]:
    """Similarity of the prompts of the pool, and of the target's held-out rows, to those of its other rows."""
    done = from_first(lambda: list(work.folder.lines(_SIMILAR)))
    if not done:
        model, data = tuned(), concatenate_datasets([pool, held_out, seen])
        texts = [prompt_of(ids, labels) for ids, labels in zip(data["input_ids"], data["labels"], strict=True)]
        own = slice(rank(), None, world_size())  # each rank has a part of the texts
        with short_rows(), model.disable_adapter(), stages(work.console) as progress:
            part = embed(model, texts[own], _WIDER * work.recipe.batch_size, progress)
        all_RH = part.new_zeros(len(texts), part.shape[1])
        all_RH[own] = part
        all_RH = mean_over_ranks(all_RH, model_device(model)) * world_size()
        pool_RH, unseen_TH, seen_KH = torch.split(all_RH, [len(pool), len(held_out), len(seen)])
        mean_H = pool_RH.mean(0)
        values = [nearest(rows, seen_KH, mean_H).tolist() for rows in (pool_RH, unseen_TH)]
        done = [dict(zip(("pool", "unseen"), values, strict=True))]
        if rank() == 0:
            work.folder.append(_SIMILAR, done[0])
    return np.array(done[0]["pool"], np.float64), np.array(done[0]["unseen"], np.float64)


def _prefix(few: Few) -> str:
    return "" if few.name == "target" else f"{few.name}/"


@contextmanager
def _earlier(model: Any) -> Iterator[None]:
    """The model before the training on the few rows: the base, or the one tuned on the pool."""
    if _POOL not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(_POOL)
    try:
        yield
    finally:
        model.set_adapter("default")


def _tuned(work: _Work, few: Few) -> Any:
    """Tune the model on the few rows but the unseen ones, unless an earlier call has, and load it with the adapter.

    Bad rows tune a model that was tuned on the pool, whose adapter is loaded too. Both are loaded even after trainings
    in this call, so that the losses of an interrupted call are the same.
    """
    folder, rows, recipe = work.folder.path / _prefix(few), work.rows, work.recipe
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        unseen = [[absolute_place(row.origin)] for row in (*few.unseen, *few.copies)]
        work.folder.write(f"{_prefix(few)}{_UNSEEN}", _csv(["place"], unseen))
    same: dict[str, Any] = {name: getattr(recipe, name) for name in _SAME}
    own = {**same, "train": few.file, "drop_rows": str(folder / _UNSEEN), "steps": work.steps}
    if few.name == "avoid":
        others = [[absolute_place(place)] for each in rows.few for place in each.in_pool]
        if rank() == 0 and others:
            work.folder.write(f"{_prefix(few)}{_OTHERS}", _csv(["place"], others))
        pool = {**same, "train": recipe.train, "limit": recipe.limit, "steps": work.steps}
        pool |= {"drop_rows": str(folder / _OTHERS)} if others else {}
        _tune(work, folder / _POOL, pool, "the pool")
        shape = {name: getattr(Recipe, name) for name in ("rank", "alpha", "targets", "layers")}
        own |= {**shape, "steps": _FURTHER, "from_adapter": str(folder / _POOL)}
    _tune(work, folder / _TUNING, own, f"{counted(len(few.rows) - len(few.unseen), 'row')} of {few.title}")
    source = work.source_of(recipe.model)
    with first_rank_first():
        model, _ = source.load(recipe.dtype, recipe.quantize)
    use_attention(model, recipe.attention)
    if torch.accelerator.is_available() and recipe.quantize is None:  # quantized weights are there already
        model = model.to(torch.accelerator.current_accelerator())
    tuned = load_adapter(model, folder / _TUNING / "adapter", recipe.model)
    if few.name == "avoid":
        tuned.load_adapter(str(folder / _POOL / "adapter"), adapter_name=_POOL, autocast_adapter_dtype=False)
    return tuned


def _tune(work: _Work, folder: Path, settings: Mapping[str, Any], rows: str) -> None:
    """Train in a run folder, or continue there; a training that has finished is not repeated."""
    if from_first(lambda: _has_finished(folder)):
        return
    resume = from_first(lambda: _has_checkpoint(folder))
    work.console.print(f"training on {rows}, to score the pool", markup=False)
    try:
        tune(Recipe(**settings, out=str(folder), resume=resume), work.console, work.source_of)
    except TrainingError as error:  # without the advice to resume that training as a run
        cause = error.__cause__ if isinstance(error.__cause__, TrainingError) else error
        raise TrainingError(f"training on {rows}: {cause}") from error
    free()


def _has_finished(folder: Path) -> bool:
    """Whether a training has ended; an interrupted one leaves an adapter too."""
    return folder.exists() and RunFolder(folder).has_finished()


def _has_checkpoint(folder: Path) -> bool:
    """Whether that training can continue; without a checkpoint its folder is removed."""
    if folder.exists() and not RunFolder(folder).has_checkpoint():
        shutil.rmtree(folder)
    return folder.exists()


def _write_scores(
    work: _Work, few: Few, pool: Sequence[Row], chosen_R: NDArray[np.bool_], columns: Mapping[str, Floats]
) -> None:
    """Write the scores of the pool by the target, or by the bad rows."""
    lines, values = [], zip(*columns.values(), strict=True)
    for row, source, chosen, own in zip(pool, sources(pool), chosen_R, values, strict=True):
        numbers = [f"{value:.5f}" for value in own]
        texts = [inert(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…") for text in (source, *text_of(row))]
        lines.append([row.origin, *numbers, int(chosen), *texts])
    header = ["place", *columns, "selected", "source", "prompt", "completion"]
    work.folder.write(f"{_prefix(few)}{SCORES}", _csv(header, lines))


def _write(work: _Work, pool: Sequence[Row], selected: set[int]) -> list[int]:
    """Write the selected and the other rows; returns the numbers of the former among all rows of the pool's files."""
    folder, recipe, text, numbers = work.folder, work.recipe, io.StringIO(), list[int]()
    others = [row.origin for number, row in enumerate(pool) if number not in selected]
    dropped = [
        [absolute_place(place)] for place in (*others, *(place for few in work.rows.few for place in few.in_pool))
    ]
    if dropped:
        folder.write(DROPPED, _csv(["place"], dropped))
    else:
        (folder.path / DROPPED).unlink(missing_ok=True)
    places = {pool[number].origin for number in selected}
    records = (pair for name in train_files(recipe) for pair in placed_records(name, recipe.train_split, recipe.limit))
    for number, (place, record) in enumerate(records):
        if place in places:
            text.write(json.dumps(record, default=str) + "\n")
            numbers.append(number)
    folder.write(SIFTED, text.getvalue())
    return numbers


def _csv(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    return text.getvalue()
