"""Sift a pool of training rows by a few rows of the target task.

FOLDER/
  sift.json        the settings and digests of rows that results depend on; later also counts and seconds
  unseen.csv       the rows of the target that the training leaves out
  tuning/          run folder of the training on the other rows of the target
  losses.jsonl     a line for every 512 rows: their losses after that training and before
  scores.csv       every row of the pool: place, score, both losses, whether it was selected, and the start of its text
  dropped.csv      the rows that were not selected, for `siftune train --drop-rows`
  sifted.jsonl     the selected rows as they are in the pool, for any trainer

An interrupted call continues: the training from its last checkpoint, the losses after the last line.
"""

import csv
import io
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from siftune.base.errors import DataError, RecipeError
from siftune.base.files import Progress, only_process
from siftune.base.stages import stages
from siftune.base.text import counted, inert
from siftune.base.work_folder import WorkFolder
from siftune.data.read import load_rows, placed_records
from siftune.data.rows import Row, row_texts
from siftune.data.target import sources
from siftune.engine.ranks import from_first, in_launch, mean_over_ranks, rank, wait_for_all, world_size
from siftune.evaluate.likelihood import row_nll
from siftune.models.adapters.attach import load_adapter
from siftune.models.attention import short_rows
from siftune.models.load import use_attention
from siftune.models.modules import model_device
from siftune.recipe.schema import Recipe, resolve_recipe, train_files
from siftune.records.rows import Read, digest_of, read_rows, text_of
from siftune.sifting.scores import Floats, choose, held_out_count, lowest, scores
from siftune.train.folder.run import RunFolder
from siftune.train.prepare import ModelSource, Source, prepare, refuse_read
from siftune.train.run import train

STEPS = 60  # of the training on the target's rows (ours: docs/sifting.md)
LEAST = 8  # rows of a target (ours)
FOLDER = "sift"  # of a run folder
SCORES, DROPPED, SIFTED, RECORD = "scores.csv", "dropped.csv", "sifted.jsonl", "sift.json"
_LOSSES, _UNSEEN, _TUNING = "losses.jsonl", "unseen.csv", "tuning"
_CHUNK = 512  # rows in a line of losses.jsonl
_SHOWN = 300  # characters of a text in scores.csv
_WIDER = 4  # times the rows of a training step in a forward pass
# settings of the training on the target's rows: those of the training that follows
_SAME = (
    *("model", "dtype", "quantize", "attention", "train_split", "format", "template", "max_length", "completion_only"),
    *("bad_rows", "rank", "alpha", "targets", "layers", "lr", "batch_size", "accumulate", "checkpointing", "sharding"),
    "seed",
)


@dataclass(frozen=True)
class Sifted:
    """A sifted pool.

    Attributes:
        folder: The folder with its files.
        places: Places of the rows of the pool, such as "pool.jsonl:17".
        scores: (R,) float64, of each of these rows: its loss after training on the target minus its loss before, in
            nats per label token. The lower, the more it is like the target.
        selected: Numbers of the selected rows in `places`, ascending.
        reason: Why these rows were selected, as a clause.
        also_target: Places of rows of the pool that are rows of the target: left out, and not in `places`.
        notes: Sentences on these, and on copies.
        seconds: Time that sifting took, without that of calls that were interrupted.
    """

    folder: Path
    places: Sequence[str]
    scores: Floats
    selected: Sequence[int]
    reason: str
    also_target: Sequence[str]
    notes: Sequence[str]
    seconds: float

    @property
    def rows(self) -> Path:
        """JSONL file of the selected rows, for any trainer."""
        return self.folder / SIFTED

    @property
    def dropped(self) -> Path:
        """CSV file of the other rows, for the recipe's `drop_rows`."""
        return self.folder / DROPPED


def sift(
    recipe: Recipe,
    share: float | int | None = None,
    steps: int = STEPS,
    console: Console | None = None,
    source_of: Callable[[str], Source] = ModelSource,
) -> Sifted:
    """Select the rows of a pool that are like a few rows of a target (ours; scores.py has the formula).

    The model is tuned on most of the target's rows. A row's score is the change of its loss, and rows with a score below
    0 are selected. The scores of the target's other rows show whether to trust this: see `choose`.

    Args:
        recipe: `train` is the pool, `target` the rows of the task, `out` the folder. Model, format, template and
            adapter should be those of the training that follows.
        share: Share of the pool to select, below 1, or a number of rows. None: those with a score below 0.
        steps: Optimizer steps of the training on the target's rows.
        console: Console for progress; stderr by default.
        source_of: Maps the recipe's `model` to its source, as for `train`.

    Raises:
        InputError: The recipe, its rows or the model cannot be used.

    Example:
        >>> sifted = sift(Recipe(train="pool.jsonl", target="few.jsonl", out="runs/sifted"))  # doctest: +SKIP
        >>> dataset = load_dataset("json", data_files=str(sifted.rows))  # doctest: +SKIP
    """
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    _check(recipe)
    with in_launch(), ExitStack() as stack:
        console = Console(quiet=True) if rank() else console
        recipe = source_of(recipe.model).settle(resolve_recipe(_dense(recipe)))
        rows = _read(recipe)
        _check_rows(rows, share, recipe)
        work = WorkFolder(str(recipe.out), RECORD, f"{_TUNING}/checkpoints/*", _LOSSES)
        if rank() == 0:
            stack.enter_context(work.begin(_facts(recipe, rows, steps)))
            stack.enter_context(only_process(work.path))
        return _sift(_Work(recipe, rows, steps, work, console, source_of), share)


def sift_first(
    recipe: Recipe, share: float | int | None, console: Console, source_of: Callable[[str], Source] = ModelSource
) -> tuple[Recipe, Sifted]:
    """Sift the pool of a recipe into the folder `sift` of its run.

    Returns:
        The recipe without the rows that were not selected, and the sifted pool.

    Raises:
        InputError: As `sift`, or the recipe leaves out rows already.
    """
    if recipe.drop_rows is not None:
        raise RecipeError("sift and drop_rows both say which rows are left out: give one of them")
    recipe = resolve_recipe(recipe)
    sifted = sift(replace(recipe, out=str(Path(str(recipe.out)) / FOLDER)), share, console=console, source_of=source_of)
    left_out = len(sifted.selected) < len(sifted.places) or sifted.also_target
    return replace(recipe, drop_rows=str(sifted.dropped)) if left_out else recipe, sifted


@dataclass(frozen=True)
class _Rows:
    pool: list[Row]  # without rows of the target
    target: list[Row]
    unseen: list[Row]  # rows of the target that the training leaves out
    also_target: list[str]  # places of rows of the pool that are rows of the target
    bad: list[DataError]

    def notes(self) -> list[str]:
        copies = len(self.pool) - len(set(row_texts(self.pool)))
        pairs = (
            (len(self.also_target), "of the pool {} in the target too: left out of the pool"),
            (copies, "of the pool {} the text of an earlier row, and the same score"),
        )
        verbs = (("is", "are"), ("has", "have"))
        return [
            f"{counted(count, 'row')} {text.format(verb[count > 1])}"
            for (count, text), verb in zip(pairs, verbs, strict=True)
            if count
        ]


@dataclass(frozen=True)
class _Work:
    recipe: Recipe
    rows: _Rows
    steps: int
    folder: WorkFolder
    console: Console
    source_of: Callable[[str], Source]

    @property
    def source(self) -> Source:
        return self.source_of(self.recipe.model)


def _check(recipe: Recipe) -> None:
    if not recipe.train:
        raise RecipeError("there is no pool to sift: give --train FILE")
    if recipe.target is None:
        raise RecipeError("a pool is sifted by a few correct rows of the task: give them with --target FILE")
    if not recipe.out:
        raise RecipeError("sifting writes into a folder: give one with --out")
    if recipe.dp_epsilon is not None:
        raise RecipeError("sifting chooses rows by their losses, which no noise covers: leave out sift or dp_epsilon")


def _dense(recipe: Recipe) -> Recipe:
    """The recipe with the method that trains on the target's rows: LoRA in all layers, on all rows."""
    if recipe.adapter != "lora":  # rank, alpha and targets are those of another adapter
        recipe = replace(recipe, adapter="lora", rank=None, alpha=None, targets=None)
    return replace(recipe, method="dense", eval=None, target_share=0.0)


def _read(recipe: Recipe) -> _Rows:
    read = read_rows(recipe)
    bad = list(read.bad)
    target = load_rows(str(recipe.target), recipe.train_split, format=recipe.format, bad=bad)
    if len(target) < LEAST:
        raise DataError(
            f"{recipe.target} has {counted(len(target), 'row')}, but a pool is sifted by at least {LEAST}: add correct "
            "rows of the task, or train without sifting"
        )
    own = set(row_texts(target))
    pool, also_target = [], []
    for row, text in zip(read.parts["train"], row_texts(read.parts["train"]), strict=True):
        if text in own:
            also_target.append(row.origin)
        else:
            pool.append(row)
    places = np.linspace(0, len(target) - 1, held_out_count(len(target))).round()  # evenly: a file may be sorted
    return _Rows(pool, target, [target[int(place)] for place in places], also_target, bad)


def _check_rows(rows: _Rows, share: float | int | None, recipe: Recipe) -> None:
    if not rows.pool:
        raise DataError(f"every row of {recipe.train} is a row of the target: give other rows with --train")
    if isinstance(share, int) and share > len(rows.pool):
        raise RecipeError(f"{share} rows are to be selected, but the pool has {len(rows.pool)}: give a smaller number")


def _facts(recipe: Recipe, rows: _Rows, steps: int) -> dict[str, Any]:
    settings = {name: getattr(recipe, name) for name in _SAME}
    return {**settings, "steps": steps, "the pool": digest_of(rows.pool), "the target": digest_of(rows.target)}


def _sift(work: _Work, share: float | int | None) -> Sifted:
    started, rows = time.monotonic(), work.rows
    recipe = replace(work.recipe, target=None)
    read = Read({"train": rows.pool, "support": rows.unseen}, rows.bad)
    refuse_read(recipe, read, work.source.tokenizer)
    model, tokenizer = _tuned(work)
    with stages(work.console) as progress:
        prepared = prepare(recipe, tokenizer, read, progress)
        parts = [prepared.data[name].select_columns(["input_ids", "labels"]) for name in ("train", "support")]
        after, before = _losses(work, model, concatenate_datasets(parts), progress)
    pool = prepared.rows["train"]
    all_R = scores(after, before)
    scores_R, target_T = all_R[: len(pool)], all_R[len(pool) :]
    count, reason = choose(scores_R, target_T)
    if share is not None:
        count = share if isinstance(share, int) else max(1, round(share * len(pool)))
        reason = "those with the lowest scores, as many as asked for"
    if not count:
        raise DataError(
            f"training on {work.recipe.target} made no row of the pool more likely: give a pool with rows of the task, or "
            "a share"
        )
    selected = lowest(scores_R, count).tolist()
    earlier = from_first(lambda: float(work.folder.state.get("seconds", 0)))
    seconds = round(earlier + time.monotonic() - started, 1)
    sifted = Sifted(
        folder=work.folder.path,
        places=[row.origin for row in pool],
        scores=scores_R,
        selected=selected,
        reason=reason,
        also_target=rows.also_target,
        notes=rows.notes(),
        seconds=seconds,
    )
    if rank() == 0:
        _write(work, sifted, pool, after, before)
        work.folder.set_state(seconds=seconds, selected=count, pool=len(pool), reason=reason)
    wait_for_all()
    return sifted


def _tuned(work: _Work) -> tuple[Any, PreTrainedTokenizerBase]:
    """Tune the model on the target without the unseen rows, or load the adapter of an earlier call."""
    recipe, folder = work.recipe, work.folder.path / _TUNING
    if rank() == 0:
        work.folder.write(_UNSEEN, _csv(["place"], [[row.origin] for row in work.rows.unseen]))
    wait_for_all()
    if from_first(lambda: (folder / "adapter").exists()):
        model, tokenizer = work.source.load(recipe.dtype, recipe.quantize)
        use_attention(model, recipe.attention)
        return load_adapter(model, folder / "adapter", recipe.model), tokenizer
    same: dict[str, Any] = {name: getattr(recipe, name) for name in _SAME}
    unseen = str(work.folder.path / _UNSEEN)
    resume = from_first(lambda: RunFolder(folder).has_checkpoint())
    seen = len(work.rows.target) - len(work.rows.unseen)
    work.console.print(f"training on {counted(seen, 'row')} of the target, to score the pool", markup=False)
    tuning = Recipe(
        **same, train=str(recipe.target), drop_rows=unseen, steps=work.steps, out=str(folder), resume=resume
    )
    run = train(tuning, work.console, work.source_of)
    return run.model, run.tokenizer


def _losses(work: _Work, model: Any, data: Dataset, progress: Progress) -> tuple[Floats, Floats]:
    """Losses of rows with and without the adapter, in nats per label token; each (rows,) float64."""
    done = from_first(lambda: {line["start"]: line for line in work.folder.lines(_LOSSES)})
    losses = np.empty((2, len(data)))
    batch = _WIDER * work.recipe.batch_size
    for start in range(0, len(data), _CHUNK):
        progress("losses of the rows", start, len(data))
        if start not in done:
            chunk = data[start : start + _CHUNK]
            own = slice(rank(), None, world_size())  # each rank has a part of the chunk
            rows = list(zip(chunk["input_ids"][own], chunk["labels"][own], strict=True))
            part = torch.zeros(2, len(chunk["labels"]), dtype=torch.float64)
            with short_rows():
                after = row_nll(model, rows, batch)
                with model.disable_adapter():
                    before = row_nll(model, rows, batch)
            for place, result in enumerate((after, before)):
                part[place, own] = torch.from_numpy(result.nll / np.maximum(result.tokens, 1))
            after_C, before_C = (mean_over_ranks(part, model_device(model)) * world_size()).tolist()
            done[start] = {"start": start, "after": after_C, "before": before_C}
            if rank() == 0:
                work.folder.append(_LOSSES, done[start])
        losses[:, start : start + _CHUNK] = done[start]["after"], done[start]["before"]
    return losses[0], losses[1]


def _write(work: _Work, sifted: Sifted, pool: Sequence[Row], after: Floats, before: Floats) -> None:
    folder, selected = work.folder, set(sifted.selected)
    header = ["place", "score", "loss_after", "loss_before", "selected", "source", "prompt", "completion"]
    lines = []
    for number, (row, source) in enumerate(zip(pool, sources(pool), strict=True)):
        losses = [f"{values[number]:.5f}" for values in (sifted.scores, after, before)]
        texts = [inert(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…") for text in (source, *text_of(row))]
        lines.append([row.origin, *losses, int(number in selected), *texts])
    folder.write(SCORES, _csv(header, lines))
    others = [place for number, place in enumerate(sifted.places) if number not in selected]
    folder.write(DROPPED, _csv(["place"], [[place] for place in (*others, *work.rows.also_target)]))
    places = {sifted.places[number] for number in selected}
    recipe, text = work.recipe, io.StringIO()
    for name in train_files(recipe):
        for place, record in placed_records(name, recipe.train_split, recipe.limit):
            if place in places:
                text.write(json.dumps(record, default=str) + "\n")
    folder.write(SIFTED, text.getvalue())


def _csv(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    return text.getvalue()
