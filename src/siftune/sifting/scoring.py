"""Scores of a pool by a few rows: the trainings on them, the losses of the pool, the similarity of its prompts.

Each part is kept in the folder of a sifting as soon as it is there, so that an interrupted call continues: see run.py.
"""

import csv
import io
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from rich.console import Console

from siftune.base.errors import DataError, TrainingError
from siftune.base.stages import stages
from siftune.base.text import counted
from siftune.base.work_folder import WorkFolder
from siftune.engine.ranks import first_rank_first, from_first, mean_over_ranks, rank, world_size
from siftune.evaluate.likelihood import row_nll
from siftune.models.adapters.attach import load_adapter
from siftune.models.attention import short_rows
from siftune.models.load import use_attention
from siftune.models.modules import check_window, model_device
from siftune.recipe.schema import Recipe
from siftune.records.rows import absolute_place
from siftune.sifting.rows import PARTS, Few, Rows
from siftune.sifting.scores import (
    Choice,
    Floats,
    choose,
    lowest,
    of_task,
    scores,
    too_few,
    training_lengths,
    unlike,
    why_too_few,
)
from siftune.sifting.similarity import embed, nearest, prompt_of
from siftune.train.folder.run import RunFolder
from siftune.train.guards.memory import free
from siftune.train.prepare import Prepared, Source
from siftune.train.run import train as tune

AVOID = "avoid"  # folder of what the bad rows score, and their name in `rows.PARTS`
LOSSES, SIMILAR, TUNING = "losses.jsonl", "similar.jsonl", "tuning"
POOL = "pool"  # of the bad rows' folder: the training on the pool
_UNSEEN, _OTHERS = "unseen.csv", "others.csv"  # rows that the trainings on the few and on the pool leave out
_FURTHER = 20  # steps on the bad rows, after those on the pool (ours)
_CHUNK = 512  # rows in a line of losses.jsonl
_WIDER = 4  # times the rows of a training step in a forward pass, unless the step saves no activations
# settings of the trainings: those of the training that follows
SAME = (
    *("model", "dtype", "quantize", "attention", "columns", "template", "max_length", "completion_only"),
    *("bad_rows", "rank", "alpha", "targets", "layers", "lr", "batch_size", "accumulate", "checkpointing", "seed"),
    "deterministic",
)


@dataclass(frozen=True)
class Work:
    """A sifting: its recipe, rows and folder."""

    recipe: Recipe
    rows: Rows
    steps: int
    folder: WorkFolder
    console: Console
    source_of: Callable[[str], Source]


@dataclass(frozen=True)
class Part:
    """Scores of a pool by the target or by the bad rows, and the choice by them."""

    choice: Choice  # by the target, or by the bad rows
    columns: Mapping[str, Floats]  # of its scores.csv, each (R,)


def choose_by(work: Work, prepared: Prepared, few: Few, count: int | None) -> Part:
    """Score the pool by the target, or by the bad rows, and choose."""
    rows, own_rows = prepared.rows["train"], prepared.rows[PARTS[few.name]]
    pool, own = (prepared.data[name].select_columns(["input_ids", "labels"]) for name in ("train", PARTS[few.name]))
    unseen = {row.origin for row in few.unseen}
    aside = [number for number, row in enumerate(own_rows) if row.origin in unseen]
    held_out = own.select(aside)
    model = cache(partial(_tuned, work, few, held_out))  # loaded at most once, and only if something is missing
    after, before = _losses(work, few, concatenate_datasets([pool, held_out]), model)
    all_R = scores(after, before)
    if not np.isfinite(all_R).all():
        broken = [*rows, *(own_rows[number] for number in aside)][int(np.isfinite(all_R).argmin())]
        raise DataError(f"the loss of {broken.origin} is not finite: leave the row out, or give --dtype float32")
    score_R, few_T = all_R[: len(rows)], all_R[len(rows) :]
    columns = {"score": score_R, "loss_after": after[: len(rows)], "loss_before": before[: len(rows)]}
    if few.name == AVOID:
        choice = unlike(score_R, few_T)
    else:
        columns["similarity"], similar_T = _similar(work, prepared, few, aside, model)
        task_R = of_task(columns["similarity"], similar_T)
        choice = choose(score_R, few_T, task_R)
        if count is not None:
            doubt = f", although {why_too_few(few_T)}" if too_few(few_T) else ""
            reason = f"those with the lowest scores, as many as asked for{doubt}"
            choice = Choice(lowest(score_R, count, task_R), reason)
        if not choice.rows_R.any():
            raise DataError(
                f"no row of the pool is like those of {few.file}: give a pool with rows of the task, or a share"
            )
    del model
    free()
    return Part(choice, columns)


def _losses(work: Work, few: Few, data: Dataset, tuned: Callable[[], Any]) -> tuple[Floats, Floats]:
    """Losses of rows after the training on `few` and before it, in nats per label token; each (rows,) float64."""
    name = f"{prefix(few)}{LOSSES}"
    done = from_first(lambda: {line["start"]: line for line in work.folder.lines(name)})
    starts = range(0, len(data), _CHUNK)
    with stages(work.console) as progress:
        for start in starts:
            if start in done:
                continue
            model = tuned()
            progress("losses of the rows", start, len(data))
            after, before = _row_losses(work, model, data.select(range(start, min(start + _CHUNK, len(data)))))
            done[start] = {"start": start, "after": after.tolist(), "before": before.tolist()}
            if rank() == 0:
                work.folder.append(name, done[start])
    after_R, before_R = (np.concatenate([done[start][name] for start in starts]) for name in ("after", "before"))
    return after_R, before_R


def _row_losses(work: Work, model: Any, data: Dataset) -> tuple[Floats, Floats]:
    """Losses of rows under a model after the training and before it, in nats per label token; each (rows,) float64."""
    longest = max(map(len, data["input_ids"]))
    check_window(model, longest, "a row of the pool or the target")
    own = slice(rank(), None, world_size())  # each rank has a part of the rows
    rows = list(zip(data["input_ids"][own], data["labels"][own], strict=True))
    part = torch.zeros(2, len(data), dtype=torch.float64)
    batch = _rows_at_once(work.recipe)
    with short_rows():
        results = [row_nll(model, rows, batch)]
        with _earlier(model):
            results.append(row_nll(model, rows, batch))
    for place, result in enumerate(results):
        part[place, own] = torch.from_numpy(result.nll / np.maximum(result.tokens, 1))
    after, before = (mean_over_ranks(part, model_device(model)) * world_size()).numpy()
    return after, before


def _similar(
    work: Work, prepared: Prepared, few: Few, aside: Sequence[int], tuned: Callable[[], Any]
) -> tuple[Floats, Floats]:
    """Similarity of the prompts of the pool, and of the target's held-out rows `aside`, to those of its other rows."""
    count = len(prepared.rows["train"])
    done = from_first(lambda: list(work.folder.lines(SIMILAR)))
    if not done:
        model, size = tuned(), _rows_at_once(work.recipe)
        of_few = _prompts(prepared, PARTS[few.name])
        texts = [*_prompts(prepared, "train"), *(of_few[number] for number in aside)]
        seen = [text for number, text in enumerate(of_few) if number not in aside]
        own = slice(rank(), None, world_size())  # each rank has a part of the texts
        of_pool = len(range(count)[own])
        with short_rows(), model.disable_adapter(), stages(work.console) as progress:
            seen_KH = embed(model, seen, size)
            own_RH = embed(model, texts[own], size, progress)
        sum_H = mean_over_ranks(own_RH[:of_pool].sum(0, dtype=torch.float64), model_device(model)) * world_size()
        similar_R = torch.zeros(len(texts), dtype=torch.float64)
        similar_R[own] = nearest(own_RH, seen_KH, (sum_H / count).to(own_RH)).double()
        similar_R = mean_over_ranks(similar_R, model_device(model)) * world_size()
        values = similar_R.tolist()
        done = [{"pool": values[:count], "unseen": values[count:]}]
        if rank() == 0:
            work.folder.append(SIMILAR, done[0])
    return np.array(done[0]["pool"], np.float64), np.array(done[0]["unseen"], np.float64)


def _prompts(prepared: Prepared, part: str) -> list[Sequence[int]]:
    """Token ids of the prompts of a part's rows; all token ids of a row of text, which may begin without a label."""
    data = prepared.data[part]
    rows = zip(prepared.rows[part], data["input_ids"], data["labels"], strict=True)
    return [prompt_of(ids, labels) if row.prompt else ids for row, ids, labels in rows]


def _rows_at_once(recipe: Recipe) -> int:
    """Rows in a forward pass, which saves no activations, as a step with checkpointing hardly does."""
    return (1 if recipe.checkpointing else _WIDER) * recipe.batch_size


def prefix(few: Few) -> str:
    """Where the files of few rows are in the folder of a sifting: empty for the target's."""
    return "" if few.name == "target" else f"{few.name}/"


@contextmanager
def _earlier(model: Any) -> Iterator[None]:
    """The model before the training on the few rows: the base, or the one tuned on the pool."""
    if POOL not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(POOL)
    try:
        yield
    finally:
        model.set_adapter("default")


def _tuned(work: Work, few: Few, held_out: Dataset) -> Any:
    """Tune the model on the few rows but the unseen ones, unless an earlier call has, and load it with the adapter.

    If the training learns the target's rows by heart, as `too_few` tells by the held-out ones, a shorter one follows.

    Bad rows tune a model that was tuned on the pool, whose adapter is loaded too. Both are loaded even after trainings
    in this call, so that the losses of an interrupted call are the same.
    """
    folder, rows, recipe = work.folder.path / prefix(few), work.rows, work.recipe
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        unseen = [[absolute_place(row.origin)] for row in (*few.unseen, *few.copies)]
        work.folder.write(f"{prefix(few)}{_UNSEEN}", csv_text(["place"], unseen))
    same: dict[str, Any] = {name: getattr(recipe, name) for name in SAME}
    own = {**same, "train": few.file, "drop_rows": str(folder / _UNSEEN), "steps": work.steps}
    if few.name == AVOID:
        others = [[absolute_place(place)] for place in rows.left_out]
        if rank() == 0 and others:
            work.folder.write(f"{prefix(few)}{_OTHERS}", csv_text(["place"], others))
        pool = {**same, "train": recipe.train, "limit": recipe.limit, "steps": work.steps}
        pool |= {"drop_rows": str(folder / _OTHERS)} if others else {}
        _tune(work, folder / POOL, pool, "the pool")
        shape = {name: getattr(Recipe, name) for name in ("rank", "alpha", "targets", "layers")}
        own |= {**shape, "steps": _FURTHER, "from_adapter": str(folder / POOL)}
    words = f"{counted(len(few.rows) - len(few.unseen), 'row')} of {few.title}"
    if few.name == AVOID:
        _tune(work, folder / TUNING, own, words)
        tuned = _loaded(work, folder / TUNING)
        tuned.load_adapter(str(folder / POOL / "adapter"), adapter_name=POOL, autocast_adapter_dtype=False)
        return tuned
    lengths = training_lengths(work.steps)
    for steps in lengths:
        place = folder / (TUNING if steps == work.steps else f"{TUNING}-{steps}")
        _tune(work, place, {**own, "steps": steps}, f"{words}, {counted(steps, 'step')}")
        tuned = _loaded(work, place)
        after, before = _row_losses(work, tuned, held_out)
        if steps == lengths[-1] or not from_first(partial(too_few, scores(after, before))):
            break
        tuned = None  # the next training loads a model of its own
        free()
    return tuned


def _loaded(work: Work, folder: Path) -> Any:
    """Load the model with the adapter of a run folder."""
    recipe, source = work.recipe, work.source_of(work.recipe.model)
    with first_rank_first():
        model, _ = source.load(recipe.dtype, recipe.quantize)
    use_attention(model, recipe.attention)
    if torch.accelerator.is_available() and recipe.quantize is None:  # quantized weights are there already
        model = model.to(torch.accelerator.current_accelerator())
    return load_adapter(model, folder / "adapter", recipe.model)


def _tune(work: Work, folder: Path, settings: Mapping[str, Any], rows: str) -> None:
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


def csv_text(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """The text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    return text.getvalue()
