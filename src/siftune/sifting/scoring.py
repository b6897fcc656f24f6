"""Scores of a pool by a few rows: the similarity of its prompts, the trainings on the few rows, the losses of the pool.

Each part is written to the folder of a sifting as soon as it is computed, so that an interrupted call continues: see
run.py. Prompts come first, under the base model, so that only rows of the target's task need a loss.
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
from rich.console import Console

from siftune.base.errors import DataError, TrainingError
from siftune.base.files import Progress
from siftune.base.stages import stages
from siftune.base.text import counted
from siftune.base.work_folder import WorkFolder
from siftune.data.read import placed_records
from siftune.data.rows import Row
from siftune.data.tokens import Form, tokens_of
from siftune.engine.ranks import first_rank_first, from_first, mean_over_ranks, rank, wait_for_all, world_size
from siftune.evaluate.likelihood import row_nll
from siftune.models.adapters.attach import load_adapter
from siftune.models.attention import short_rows
from siftune.models.load import use_attention
from siftune.models.modules import check_window, model_device
from siftune.recipe.schema import SCORING, Recipe
from siftune.records.rows import absolute_place
from siftune.sifting.rows import PARTS, Few, Rows
from siftune.sifting.scores import Choice, Floats, choose, lowest, scores, unlike
from siftune.sifting.similarity import embed, nearest, nearest_other, of_task, prompt_of
from siftune.train.folder.run import RunFolder
from siftune.train.guards.memory import free
from siftune.train.prepare import Prepared, Source
from siftune.train.run import train as tune

AVOID = "avoid"  # folder of what the bad rows score, and their name in `rows.PARTS`
LOSSES, PROMPTS, SIMILAR, TUNING = "losses.jsonl", "prompts.f32", "similar.jsonl", "tuning"
POOL = "pool"  # of the bad rows' folder: the training on the pool
_SEEN, _UNSEEN, _OTHERS = "seen.jsonl", "unseen.jsonl", "others.csv"
_FURTHER = 20  # steps on the bad rows, after those on the pool (ours)
_CHUNK = 512  # rows in a line of losses.jsonl
_WIDER = 4  # times the rows of a training step in a forward pass, unless the step saves no activations
_EVERY, _PATIENCE = 10, 2  # steps between measurements of the held-out rows; measurements without improvement (ours)
_DECOYS = 4  # of each held-out row (ours)


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
    columns: Mapping[str, Floats]  # of its scores.csv, each (R,); NaN for rows without the value


def choose_by_target(work: Work, prepared: Prepared, few: Few, count: int | None) -> Part:
    """Score the pool by the target, and choose.

    Raises:
        DataError: No row is like those of the target, or a loss is not finite.
    """
    similar_R, similar_K = _similar(work, prepared, few)
    task_R = of_task(similar_R, similar_K)
    scores_R, target_T, decoys_D = _target_scores(work, prepared, few, task_R)
    columns = {"score": scores_R, "similarity": similar_R}
    if count is not None:
        order_R = np.where(task_R, scores_R, -similar_R)
        return Part(
            Choice(lowest(order_R, count, task_R), "those with the lowest scores, as many as asked for"), columns
        )
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
        made = _decoys(work, few, unseen)
        data = concatenate_datasets([pool, own.select(places), *([made] if made else [])])
        tuned = cache(partial(_tuned_on_target, work, few, number))
        name = LOSSES if number == 0 else f"{number}-{LOSSES}"
        losses = _losses(work, name, data, tuned)
        tuned.cache_clear()
        free()
        values = scores(losses.after, losses.tokens)
        _refuse_broken(values[: len(pool) + len(places)], [*names, *unseen])
        of_pool.append(values[: len(pool)])
        held_out.append(values[len(pool) : len(pool) + len(places)])
        decoys.append(values[len(pool) + len(places) :])
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
    """Held-out rows with completions of other rows of the target; None if all rows have the same completion."""
    randomness, texts = random.Random(f"decoys {work.recipe.seed}"), sorted({row.completion for row in few.rows})
    made = [
        replace(row, completion=text)
        for row in unseen
        for others in [[text for text in texts if text != row.completion]]
        for text in randomness.sample(others, min(_DECOYS, len(others)))
    ]
    if not made:
        return None
    return tokens_of(made, _form(work, work.recipe.completion_only)).data.select_columns(["input_ids", "labels"])


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
    return lambda _, done, of: progress("losses of the rows", start + done * world_size(), total)


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
        result = row_nll(model, rows, _rows_at_once(work.recipe), progress)
    part[0, own], part[1, own] = torch.from_numpy(result.nll), torch.from_numpy(np.maximum(result.tokens, 1))
    nll, tokens = (mean_over_ranks(part, model_device(model)) * world_size()).tolist()
    return nll, tokens


def _similar(work: Work, prepared: Prepared, few: Few) -> tuple[Floats, Floats]:
    """Similarity of the pool's prompts to the nearest of the target, and of each of the target's to the nearest other.

    Embeddings of the pool are kept in a file until all of them are there: the mean of all is subtracted from each.
    """
    done = from_first(lambda: list(work.folder.lines(SIMILAR)))
    if not done:
        model = _base(work)
        few_KH = embed(model, _prompts(work, prepared, PARTS[few.name]), _rows_at_once(work.recipe))
        _embed_pool(work, prepared, model, few_KH.shape[1])
        del model
        free()
        if rank() == 0:
            work.folder.append(SIMILAR, _compared(work, len(prepared.rows["train"]), few_KH))
            (work.folder.path / PROMPTS).unlink()
        wait_for_all()
        done = from_first(lambda: list(work.folder.lines(SIMILAR)))
    return np.array(done[0]["pool"], np.float64), np.array(done[0]["target"], np.float64)


def _embed_pool(work: Work, prepared: Prepared, model: Any, width: int) -> None:
    """Add the embeddings of the pool's prompts to their file, chunk by chunk, after those that are there."""
    texts, path = _prompts(work, prepared, "train"), work.folder.path / PROMPTS
    bytes_of_row = width * np.dtype(np.float32).itemsize
    begin = from_first(lambda: path.stat().st_size // bytes_of_row // _CHUNK * _CHUNK if path.exists() else 0)
    if rank() == 0:
        with path.open("ab") as file:
            file.truncate(begin * bytes_of_row)
    with short_rows(), stages(work.console) as progress:
        for start in range(begin, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            own = slice(rank(), None, world_size())  # each rank has a part of the texts
            part_RH = torch.zeros(len(chunk), width, dtype=torch.float64)
            if chunk[own]:
                part_RH[own] = embed(model, chunk[own], _rows_at_once(work.recipe)).double()
            part_RH = mean_over_ranks(part_RH, model_device(model)) * world_size()
            if rank() == 0:
                with path.open("ab") as file:
                    file.write(part_RH.float().numpy().tobytes())
            progress("similarity of the prompts", min(start + _CHUNK, len(texts)), len(texts))


def _compared(work: Work, count: int, few_KH: torch.Tensor) -> dict[str, list[float]]:
    """The similarities, as a line of their file."""
    pool_RH = np.memmap(work.folder.path / PROMPTS, np.float32, "r", shape=(count, few_KH.shape[1]))
    chunks = [slice(start, start + _CHUNK) for start in range(0, count, _CHUNK)]
    mean_H = torch.from_numpy(sum(pool_RH[own].sum(0, dtype=np.float64) for own in chunks) / count).float()
    few_KH = few_KH.float()
    similar = [nearest(torch.tensor(pool_RH[own]), few_KH, mean_H) for own in chunks]
    return {"pool": torch.cat(similar).tolist(), "target": nearest_other(few_KH, mean_H).tolist()}


def _prompts(work: Work, prepared: Prepared, part: str) -> list[Sequence[int]]:
    """Token ids of the prompts of a part's rows; all token ids of a row of text, which may begin without a label."""
    rows, data = prepared.rows[part], prepared.data[part]
    if not work.recipe.completion_only:  # prompts have labels, too
        data = tokens_of(rows, _form(work, completion_only=True)).data
    columns = zip(rows, data["input_ids"], data["labels"], strict=True)
    return [prompt_of(ids, labels) if row.prompt else ids for row, ids, labels in columns]


def _form(work: Work, completion_only: bool) -> Form:
    recipe = work.recipe
    return Form(work.source_of(recipe.model).tokenizer(), recipe.max_length, recipe.template, completion_only)


def _rows_at_once(recipe: Recipe) -> int:
    """Rows in a forward pass, which saves no activations, as a step with checkpointing hardly does."""
    return (1 if recipe.checkpointing else _WIDER) * recipe.batch_size


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
    seen, unseen = (f"{number}-{name}" if number else name for name in (_SEEN, _UNSEEN))
    origins = {row.origin for row in few.unseen[number]}
    if rank() == 0:
        work.folder.write(seen, _records_of(few, [row for row in few.rows if row.origin not in origins]))
        work.folder.write(unseen, _records_of(few, few.unseen[number]))
    wait_for_all()
    own: dict[str, Any] = {name: getattr(work.recipe, name) for name in SCORING}
    own |= {"train": str(work.folder.path / seen), "eval": str(work.folder.path / unseen), "steps": work.steps}
    if work.steps > _EVERY:
        own |= {"eval_every": _EVERY, "patience": _PATIENCE}
    _tune(work, folder, own, f"{counted(len(few.rows) - len(origins), 'row')} of the target")
    return _loaded(work, folder)


def _records_of(few: Few, rows: Sequence[Row]) -> str:
    """Rows as they are in their file, as JSON lines."""
    places = {row.origin for row in rows}
    return "".join(
        json.dumps(record, default=str) + "\n" for place, record in placed_records(few.file) if place in places
    )


def _tuned_on_bad_rows(work: Work, few: Few) -> Any:
    """Tune a model that was tuned on the pool further on the bad rows, and load both adapters."""
    folder, rows, recipe = work.folder.path / AVOID, work.rows, work.recipe
    others = [[absolute_place(place)] for place in rows.left_out]
    if rank() == 0:
        folder.mkdir(exist_ok=True)
        unseen = {row.origin for row in few.unseen[0]}
        work.folder.write(f"{AVOID}/{_SEEN}", _records_of(few, [row for row in few.rows if row.origin not in unseen]))
        if others:
            work.folder.write(f"{AVOID}/{_OTHERS}", csv_text(["place"], others))
    wait_for_all()
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


def _base(work: Work) -> Any:
    """Load the model."""
    recipe, source = work.recipe, work.source_of(work.recipe.model)
    with first_rank_first():
        model, _ = source.load(recipe.dtype, recipe.quantize)
    use_attention(model, recipe.attention)
    if torch.accelerator.is_available() and recipe.quantize is None:  # quantized weights are there already
        model = model.to(torch.accelerator.current_accelerator())
    return model


def _loaded(work: Work, folder: Path) -> Any:
    """Load the model with the adapter of a run folder."""
    return load_adapter(_base(work), folder / "adapter", work.recipe.model)


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
