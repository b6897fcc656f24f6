"""Scores of a pool by a few rows: the trainings on them, and the losses of the pool.

Each part is written to the folder of a sifting as soon as it is computed, so that an interrupted call continues: see
run.py. Prompts are compared first (prompts.py), so that only rows of the target's task need a loss.
"""

import csv
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray

from siftune.base.errors import DataError, TrainingError
from siftune.base.files import Progress
from siftune.base.stages import stages
from siftune.base.text import counted
from siftune.data.read import load_rows, placed_records
from siftune.data.rows import Row, row_texts
from siftune.data.tokens import tokens_of
from siftune.engine.ranks import from_first, mean_over_ranks, rank, wait_for_all, world_size
from siftune.evaluate.likelihood import row_nll
from siftune.models.adapters.attach import load_adapter
from siftune.models.attention import short_rows
from siftune.models.modules import check_window, model_device
from siftune.recipe.schema import SCORING, Recipe
from siftune.records.rows import absolute_place
from siftune.sifting.prompts import similarities
from siftune.sifting.rows import PARTS, Few
from siftune.sifting.scores import Choice, Floats, choose, lowest, scores, unlike
from siftune.sifting.similarity import of_task
from siftune.sifting.work import LOSSES, TUNING, Work, base_model, form_of, rows_at_once
from siftune.train.folder.run import RunFolder
from siftune.train.guards.memory import free
from siftune.train.prepare import Prepared
from siftune.train.run import train as tune

AVOID = "avoid"  # folder of what the bad rows score, and their name in `rows.PARTS`
POOL = "pool"  # of the bad rows' folder: the training on the pool
_SEEN, _UNSEEN, _OTHERS = "seen.jsonl", "unseen.jsonl", "others.csv"
_FURTHER = 20  # steps on the bad rows, after those on the pool (ours)
_CHUNK = 512  # rows in a line of losses.jsonl
# steps between measurements of the held-out rows, at most; measurements, at least; those without improvement (ours)
_EVERY, _MEASURED, _PATIENCE = 10, 6, 2
_DECOYS = 4  # of each held-out row (ours)


@dataclass(frozen=True)
class Part:
    """Scores of a pool by the target or by the bad rows, and the choice by them."""

    choice: Choice  # by the target, or by the bad rows
    columns: Mapping[str, Floats]  # of its scores.csv, each (R,); NaN for rows without the value


def choose_by_target(work: Work, prepared: Prepared, few: Few, count: int | None) -> Part:
    """Score the pool by the target, and choose.

    Raises:
        DataError: No row is like those of the target, or a loss is not finite.
    """
    similar_R, similar_K = similarities(work, prepared, PARTS[few.name])
    task_R = of_task(similar_R, similar_K)
    if not task_R.any() and count is None:
        raise DataError(
            f"no prompt of the pool is like those of {few.file}: give a pool with rows of the task, or a share"
        )
    scores_R, target_T, decoys_D = _target_scores(work, prepared, few, task_R)
    columns = {"score": scores_R, "similarity": similar_R}
    if count is not None:
        rows_R, others = lowest(np.where(task_R, scores_R, -similar_R), count, task_R), count - int(task_R.sum())
        rest = f", {others:,} of them of other tasks, by their prompts" if others > 0 else ""
        return Part(Choice(rows_R, f"those with the lowest scores, as many as asked for{rest}"), columns)
    choice = choose(scores_R, target_T, decoys_D, task_R)
    if not choice.rows_R.any():
        raise DataError(
            f"no row of the pool is like those of {few.file}: give a pool with rows of the task, or a share"
        )
    return Part(choice, columns)


def choose_by_bad_rows(work: Work, prepared: Prepared, few: Few) -> Part:
    """Score the pool by the bad rows, and choose the rows that remain.

    Raises:
        DataError: A loss is not finite.
    """
    data, held_out = _tokens(prepared, "train"), _tokens(prepared, AVOID).select(_places(prepared, few, few.unseen[0]))
    tuned = cache(partial(_tuned_on_bad_rows, work, few))  # loaded at most once, and only if something is missing
    losses = _losses(work, f"{AVOID}/{LOSSES}", concatenate_datasets([data, held_out]), tuned, both=True)
    tuned.cache_clear()
    free()
    after, before = losses.after / losses.tokens, losses.before / losses.tokens
    _refuse_broken(after + before, [*prepared.rows["train"], *few.unseen[0]])
    count, score = len(data), after - before
    columns = {"score": score[:count], "loss_after": after[:count], "loss_before": before[:count]}
    return Part(unlike(score[:count], score[count:]), columns)


def _target_scores(
    work: Work, prepared: Prepared, few: Few, task_R: NDArray[np.bool_]
) -> tuple[Floats, Floats, Floats]:
    """Scores after trainings on the target.

    Returns:
        (R,) of the pool, the mean over the trainings; NaN outside of the task. (T,) of the rows that the trainings left
        out, (D,) of decoys of these.
    """
    task = task_R.nonzero()[0].tolist()
    pool, own = _tokens(prepared, "train").select(task), _tokens(prepared, PARTS[few.name])
    names = [prepared.rows["train"][number] for number in task]
    of_pool, held_out, decoys = list[Floats](), list[Floats](), list[Floats]()
    for number, unseen in enumerate(few.unseen):
        places = _places(prepared, few, unseen)
        wrong = _decoys(work, few, unseen)
        data = concatenate_datasets([pool, own.select(places), *([wrong] if wrong else [])])
        tuned = cache(partial(_tuned_on_target, work, few, number))
        losses = _losses(work, _of_training(number, LOSSES), data, tuned)
        tuned.cache_clear()
        free()
        parts = np.split(scores(losses.after, losses.tokens), [len(pool), len(pool) + len(places)])
        _refuse_broken(np.concatenate(parts[:2]), [*names, *unseen])
        for part, values in zip((of_pool, held_out, decoys), parts, strict=True):
            part.append(values)
    scores_R = np.full(len(task_R), np.nan)
    scores_R[task] = np.mean(of_pool, axis=0)
    return scores_R, np.concatenate(held_out), np.concatenate(decoys)


def _tokens(prepared: Prepared, part: str) -> Dataset:
    return prepared.data[part].select_columns(["input_ids", "labels"])


def _places(prepared: Prepared, few: Few, rows: Sequence[Row]) -> list[int]:
    """Numbers of rows among the tokenized rows of the target, or among the bad rows."""
    origins = {row.origin for row in rows}
    return [number for number, row in enumerate(prepared.rows[PARTS[few.name]]) if row.origin in origins]


def _decoys(work: Work, few: Few, unseen: Sequence[Row]) -> Dataset | None:
    """Held-out rows with completions of other rows of the target; None if there are no others, or no prompts."""
    randomness, texts = random.Random(f"decoys {work.recipe.seed}"), sorted({row.completion for row in few.rows})
    decoys = []
    for row in unseen:
        others = [text for text in texts if text.strip() != row.completion.strip()]
        if row.prompt:
            decoys += [replace(row, completion=text) for text in randomness.sample(others, min(_DECOYS, len(others)))]
    if not decoys:
        return None
    return tokens_of(decoys, form_of(work, work.recipe.completion_only)).data.select_columns(["input_ids", "labels"])


def _refuse_broken(values: Floats, rows: Sequence[Row]) -> None:
    if not np.isfinite(values).all():
        place = rows[int(np.isfinite(values).argmin())].origin
        raise DataError(f"the loss of {place} is not finite: leave the row out, or give --dtype float32")


class _Losses(NamedTuple):
    """Losses of rows, summed over label tokens, in nats, and the number of these; each (rows,)."""

    after: Floats  # the training
    before: Floats  # the training; empty if not asked for
    tokens: Floats


def _losses(work: Work, name: str, data: Dataset, tuned: Callable[[], Any], both: bool = False) -> _Losses:
    """Losses of rows after a training and, if `both`, before it."""
    done = from_first(lambda: {line["start"]: line for line in work.folder.lines(name)})
    starts = range(0, len(data), _CHUNK)
    with stages(work.console) as progress:
        for start in starts:
            if start in done:
                continue
            model = tuned()
            rows = data.select(range(start, min(start + _CHUNK, len(data))))
            after, tokens = _row_losses(work, model, rows, _shifted(progress, start, len(data)))
            done[start] = {"start": start, "tokens": tokens, "after": after, "before": []}
            if both:
                with _earlier(model):
                    done[start]["before"], _ = _row_losses(work, model, rows)
            if rank() == 0:
                work.folder.append(name, done[start])
    parts = ([value for start in starts for value in done[start][part]] for part in _Losses._fields)
    return _Losses(*(np.array(part, np.float64) for part in parts))


def _shifted(progress: Progress, start: int, total: int) -> Progress:
    """Progress of a chunk as that of all rows."""
    return lambda _, done, of: progress("losses of the rows", min(start + done * world_size(), total), total)


def _row_losses(
    work: Work, model: Any, data: Dataset, progress: Progress | None = None
) -> tuple[list[float], list[float]]:
    """Losses of rows under a model, summed over label tokens, in nats; and the numbers of these tokens, at least 1."""
    longest = max(map(len, data["input_ids"]))
    check_window(model, longest, "a row of the pool or the target")
    own = slice(rank(), None, world_size())  # each rank has a part of the rows
    rows = list(zip(data["input_ids"][own], data["labels"][own], strict=True))
    part = torch.zeros(2, len(data), dtype=torch.float64)
    with short_rows():
        result = row_nll(model, rows, rows_at_once(work.recipe), progress)
    part[0, own], part[1, own] = torch.from_numpy(result.nll), torch.from_numpy(np.maximum(result.tokens, 1))
    nll, tokens = (mean_over_ranks(part, model_device(model)) * world_size()).tolist()
    return nll, tokens


def prefix(few: Few) -> str:
    """Where the files of few rows are in the folder of a sifting: empty for the target's."""
    return "" if few.name == "target" else f"{few.name}/"


@contextmanager
def _earlier(model: Any) -> Iterator[None]:
    """The model tuned on the pool, before the training on the bad rows."""
    model.set_adapter(POOL)
    try:
        yield
    finally:
        model.set_adapter("default")


def _tuned_on_target(work: Work, few: Few, number: int) -> Any:
    """Tune the model on the target's rows without those that a training leaves out, unless an earlier call has.

    The training stops if the held-out rows' loss no longer falls, and its best weights remain. They are loaded even
    after a training in this call, so that the losses of an interrupted call are the same.
    """
    folder = work.folder.path / (TUNING if number == 0 else f"{TUNING}-{number}")
    seen, unseen = (_of_training(number, name) for name in (_SEEN, _UNSEEN))
    origins = {row.origin for row in few.unseen[number]}
    _write_records(work, few, seen, [row for row in few.rows if row.origin not in origins])
    _write_records(work, few, unseen, few.unseen[number])
    own: dict[str, Any] = {name: getattr(work.recipe, name) for name in SCORING}
    own |= {"train": str(work.folder.path / seen), "eval": str(work.folder.path / unseen), "steps": work.steps}
    if work.steps >= _MEASURED:
        own |= {"eval_every": min(_EVERY, work.steps // _MEASURED), "patience": _PATIENCE}
    _tune(work, folder, own, f"{counted(len(few.rows) - len(origins), 'row')} of the target")
    return _loaded(work, folder)


def _of_training(number: int, name: str) -> str:
    """Name of a file of the first or the second training on the target."""
    return f"{number}-{name}" if number else name


def _write_records(work: Work, few: Few, name: str, rows: Sequence[Row]) -> None:
    """Write rows as they are in their file, as JSON lines.

    Raises:
        DataError: They would be read as other rows: the columns of a file's first row determine its format.
    """
    if rank() == 0:
        places = {row.origin for row in rows}
        records = (record for place, record in placed_records(few.file) if place in places)
        work.folder.write(name, "".join(json.dumps(record, default=str) + "\n" for record in records))
    wait_for_all()
    again = load_rows(str(work.folder.path / name), columns=work.recipe.columns)
    if [*row_texts(again)] != [*row_texts(rows)]:
        raise DataError(f"the rows of {few.file} have different columns: give all of them the same")


def _tuned_on_bad_rows(work: Work, few: Few) -> Any:
    """Tune a model that was tuned on the pool further on the bad rows, and load both adapters."""
    folder, rows, recipe = work.folder.path / AVOID, work.rows, work.recipe
    others = [[absolute_place(place)] for place in rows.left_out]
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        if others:
            work.folder.write(f"{AVOID}/{_OTHERS}", csv_text(["place"], others))
    unseen = {row.origin for row in few.unseen[0]}
    _write_records(work, few, f"{AVOID}/{_SEEN}", [row for row in few.rows if row.origin not in unseen])
    same: dict[str, Any] = {name: getattr(recipe, name) for name in SCORING}
    pool = {**same, "train": recipe.train, "limit": recipe.limit, "steps": work.steps}
    pool |= {"drop_rows": str(folder / _OTHERS)} if others else {}
    _tune(work, folder / POOL, pool, "the pool")
    shape = {name: getattr(Recipe, name) for name in ("rank", "alpha", "targets", "layers")}
    own = {**same, **shape, "steps": _FURTHER, "from_adapter": str(folder / POOL), "train": str(folder / _SEEN)}
    _tune(work, folder / TUNING, own, f"{counted(len(few.rows) - len(few.unseen[0]), 'row')} of the bad rows")
    tuned = _loaded(work, folder / TUNING)
    tuned.load_adapter(str(folder / POOL / "adapter"), adapter_name=POOL, autocast_adapter_dtype=False)
    return tuned


def _loaded(work: Work, folder: Path) -> Any:
    """Load the model with the adapter of a run folder."""
    return load_adapter(base_model(work), folder / "adapter", work.recipe.model)


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
