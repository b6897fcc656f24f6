"""Sift a pool of training rows by a few rows of the target task.

FOLDER/
  sift.json        the settings and digests of rows that results depend on; later also counts and seconds
  unseen.csv       the rows of the target that the training leaves out
  tuning/          run folder of the training on the other rows of the target
  losses.jsonl     a line for every 512 rows: their losses after that training and before
  scores.csv       every row of the pool: place, score, both losses, whether it was selected, and the start of its text
  dropped.csv      the rows that were not selected, for `siftune train --drop-rows`; missing if there are none
  sifted.jsonl     the selected rows as they are in the pool, for any trainer

An interrupted call continues: the training from its last checkpoint, the losses after the last line. If all losses are
there, no model is loaded.
"""

import csv
import io
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from rich.console import Console

from siftune.base.environment import launch_rank
from siftune.base.errors import DataError, RecipeError, TrainingError
from siftune.base.files import only_process
from siftune.base.stages import stages
from siftune.base.text import counted, inert
from siftune.base.work_folder import WorkFolder
from siftune.data.read import placed_records
from siftune.data.rows import Row, row_texts
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
from siftune.records.rows import Read, absolute_place, digest_of, read_rows, text_of
from siftune.sifting.scores import Floats, choose, held_out_count, lowest, scores
from siftune.train.folder.run import RunFolder
from siftune.train.guards.memory import free
from siftune.train.prepare import NAMED, ModelSource, Prepared, Source, bad_lines, prepare, refuse_read
from siftune.train.resume import find_checkpoint
from siftune.train.run import train as tune

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
    *("bad_rows", "rank", "alpha", "targets", "layers", "lr", "batch_size", "accumulate", "checkpointing", "seed"),
)


@dataclass(frozen=True)
class Sifted:
    """A sifted pool.

    Attributes:
        folder: The folder with its files.
        selected: Numbers of the selected rows among all rows of the pool, from 0, ascending, for `Dataset.select`.
        places: (R,) places of the rows that have scores, such as "pool.jsonl:17"; not of the target's rows.
        scores: (R,) float64: loss after training on the target minus loss before, in nats per label token. The lower,
            the more a row is like the target.
        reason: Why these rows were selected, as a clause.
        notes: Sentences on unusable rows, copies, and rows of the target in the pool.
        seconds: Time that sifting took, without that of calls that were interrupted.
    """

    folder: Path
    selected: Sequence[int]
    places: Sequence[str]
    scores: Floats
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
    target: str | Path,
    share: float | int | None = None,
    steps: int = STEPS,
    console: Console | None = None,
    source_of: Callable[[str], Source] = ModelSource,
    **settings: Any,
) -> Sifted:
    """Select the rows of a pool that are like a few rows of a target (ours; scores.py has the formula).

    The model is tuned on most of the target's rows. A row's score is the change of its loss, and rows with a score
    below 0 are selected. The scores of the target's other rows show whether to trust this: see `choose`.

    Args:
        train: The pool: a file or hub id, or several.
        target: File or hub id of at least 8 correct rows of the task.
        share: Share of the pool to select, below 1, or a number of rows. None: those with a score below 0.
        steps: Optimizer steps of the training on the target's rows.
        console: Console for progress; stderr by default.
        source_of: Maps the setting `model` to its source, as for `siftune.train.run.train`.
        settings: Further settings of a recipe. `out` is the folder, by default runs/DATE-sift. Model, format, template
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
    recipe = Recipe(**{**settings, "train": pool, "target": str(target)})
    check_sifting(recipe, share)
    with in_launch(), ExitStack() as stack:
        console = Console(quiet=True) if rank() else console or Console(stderr=True, highlight=False, soft_wrap=True)
        recipe = from_first(lambda: _dense(recipe))
        source = source_of(recipe.model)
        recipe = source.settle(recipe)
        rows = _read(recipe, source)
        with first_rank_first(), stages(console) as progress:
            parts = Read({"train": rows.pool, "support": rows.unseen}, rows.bad)
            prepared = prepare(replace(recipe, target=None), source.tokenizer(), parts, progress)
        count = _count(share, len(prepared.rows["train"]))
        folder = WorkFolder(str(recipe.out), RECORD, f"{_TUNING}/checkpoints/*", _LOSSES)
        if rank() == 0:
            stack.enter_context(folder.begin(_facts(recipe, rows, steps, source.identity)))
            stack.enter_context(only_process(folder.path))
        try:
            return _sift(_Work(recipe, rows, steps, folder, console, source_of), prepared, count)
        except KeyboardInterrupt as stop:
            stop.__notes__ = ["the same command continues"]  # not that of the training on the target's rows
            raise


def sift_first(
    recipe: Recipe, share: float | int | None, console: Console, source_of: Callable[[str], Source] = ModelSource
) -> tuple[Recipe, Sifted]:
    """Sift the pool of a recipe into the folder `sift` of its run.

    Returns:
        The recipe without the rows that were not selected, and the sifted pool. If the run was interrupted while
        sifting, the recipe does not resume, since there is nothing to resume.

    Raises:
        InputError: As `sift`, or the recipe cannot be used, or its folder holds a run.
    """
    check(recipe)
    check_sifting(recipe, share)
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
        sifted = sift(**settings, share=share, console=console, source_of=source_of)
    return recipe if sifted.dropped is None else replace(recipe, drop_rows=str(sifted.dropped)), sifted


def check_sifting(recipe: Recipe, share: float | int | None = None) -> None:
    """Refuse settings by which a pool cannot be sifted, before its rows are read.

    Raises:
        RecipeError: With one sentence on the first.
    """
    # of YAML, the command line and callers alike: True is no number here
    number = (type(share) is int and share >= 1) or (type(share) is float and 0 < share < 1)
    names = [*train_files(recipe), *([recipe.target] if recipe.target else [])]
    files = [Path(name).expanduser().resolve() if Path(name).expanduser().exists() else name for name in names]
    twice = next((name for place, name in enumerate(names) if files[place] in files[:place]), "")
    faults = (
        (not recipe.train, "there is no pool to sift: give --train FILE"),
        (
            recipe.dp_epsilon is not None,
            "sifting chooses rows by their losses, which no noise covers: leave out sift or dp_epsilon",
        ),
        (not recipe.target, "a pool is sifted by a few correct rows of the task: give them with --target FILE"),
        (bool(twice), f"{twice} is named twice, in the pool or as the target: name each file once"),
        (recipe.drop_rows is not None, "sift and drop_rows both say which rows are left out: give one of them"),
        (
            recipe.sharding != "none",
            "sifting computes losses with the complete model in each process: leave out sift or sharding",
        ),
        (
            share is not None and not number,
            f"share is {share!r}, but must be a share of the pool, above 0 and below 1, or a number of rows",
        ),
    )
    for is_wrong, sentence in faults:
        if is_wrong:
            raise RecipeError(sentence)


@dataclass(frozen=True)
class _Rows:
    pool: list[Row]  # without rows of the target
    target: list[Row]  # without copies
    unseen: list[Row]  # rows of the target that the training leaves out
    copies: list[Row]  # of rows of the target, in the target
    also_target: list[str]  # places of rows of the pool that are rows of the target
    bad: list[DataError]

    def notes(self) -> list[str]:
        earlier = len(self.pool) - len(set(row_texts(self.pool)))
        counts = (
            (len(self.also_target), ("is", "are"), "of the pool {} in the target too: left out of the pool"),
            (earlier, ("has", "have"), "of the pool {} the text of an earlier row: copies stay in the pool"),
            (len(self.copies), ("has", "have"), "of the target {} the text of an earlier row: left out of sifting"),
        )
        return [f"{counted(count, 'row')} {text.format(verb[count > 1])}" for count, verb, text in counts if count]


@dataclass(frozen=True)
class _Work:
    recipe: Recipe
    rows: _Rows
    steps: int
    folder: WorkFolder
    console: Console
    source_of: Callable[[str], Source]


def _dense(recipe: Recipe) -> Recipe:
    """The recipe with the method that trains on the target's rows: LoRA on all rows."""
    if recipe.adapter != "lora":  # rank, alpha, targets and rate are those of another adapter
        recipe = replace(recipe, adapter="lora", rank=None, alpha=None, targets=None, lr=None, outside=())
    if method_of(recipe).lr != method_of(Recipe()).lr:
        recipe = replace(recipe, lr=None)
    recipe = replace(recipe, method="dense", target_share=0.0, target_last=None)
    return resolve_recipe(replace(recipe, out=recipe.out or new_folder("sift")))


def _read(recipe: Recipe, source: Source) -> _Rows:
    pool = read_rows(recipe)
    target = read_rows(replace(recipe, train=str(recipe.target), target=None, limit=None, eval=None, eval_share=0.0))
    bad = [*pool.bad, *target.bad]
    refuse_read(recipe, Read({"train": pool.parts["train"], "support": target.parts["train"]}, bad), source.tokenizer)
    own: dict[bytes, Row] = {}
    copies, others, also_target = [], [], []
    for row, text in zip(target.parts["train"], row_texts(target.parts["train"]), strict=True):
        if own.setdefault(text, row) is not row:
            copies.append(row)
    for row, text in zip(pool.parts["train"], row_texts(pool.parts["train"]), strict=True):
        if text in own:
            also_target.append(row.origin)
        else:
            others.append(row)
    few = list(own.values())
    if len(few) < LEAST:
        raise DataError(
            f"{recipe.target} has {counted(len(few), 'row')} that can be used{' and differ' if copies else ''}, but a "
            f"pool is sifted by at least {LEAST}: add correct rows of the task, or train without sifting"
        )
    if not others:
        raise DataError(f"no row of {' '.join(train_files(recipe))} is outside of the target: give other rows")
    places = np.linspace(0, len(few) - 1, held_out_count(len(few))).round()  # evenly: a file may be sorted
    return _Rows(others, few, [few[int(place)] for place in places], copies, also_target, bad)


def _count(share: float | int | None, pool: int) -> int | None:
    """Number of rows to select; None if the target's rows determine it."""
    if isinstance(share, int) and share > pool:
        raise RecipeError(f"{share} rows are to be selected, but the pool has {pool}: give a smaller number")
    return max(1, round(share * pool)) if isinstance(share, float) else share


def _facts(recipe: Recipe, rows: _Rows, steps: int, identity: Mapping[str, str]) -> dict[str, Any]:
    settings = {name: getattr(recipe, name) for name in _SAME}
    digests = {"the pool": digest_of(rows.pool), "the target": digest_of(rows.target)}
    return {**settings, "steps": steps, **digests, **identity}


def _sift(work: _Work, prepared: Prepared, count: int | None) -> Sifted:
    started, rows = time.monotonic(), work.rows
    pool, unseen = prepared.rows["train"], prepared.rows["support"]
    parts = [prepared.data[name].select_columns(["input_ids", "labels"]) for name in ("train", "support")]
    after, before = _losses(work, concatenate_datasets(parts))
    all_R = scores(after, before)
    if not np.isfinite(all_R).all():
        broken = [*pool, *unseen][int(np.isfinite(all_R).argmin())]
        raise DataError(f"the loss of {broken.origin} is not finite: leave the row out, or give --dtype float32")
    scores_R, target_T = all_R[: len(pool)], all_R[len(pool) :]
    choice = choose(scores_R, target_T)
    reason = choice.reason if count is None else "those with the lowest scores, as many as asked for"
    count = choice.rows if count is None else count
    if not count:
        raise DataError(
            f"training on {work.recipe.target} made no row of the pool more likely: give a pool with rows of the task, "
            "or a share"
        )
    selected = lowest(scores_R, count)
    numbers = from_first(lambda: _write(work, pool, set(selected.tolist()), after, before))
    earlier = from_first(lambda: float(work.folder.state.get("seconds", 0)))
    seconds = round(earlier + time.monotonic() - started, 1)
    if rank() == 0:
        work.folder.set_state(seconds=seconds, selected=count, pool=len(pool), reason=reason)
    wait_for_all()
    return Sifted(
        folder=work.folder.path,
        selected=numbers,
        places=[row.origin for row in pool],
        scores=scores_R,
        reason=reason,
        notes=[*bad_lines(prepared, NAMED), *rows.notes()],
        seconds=seconds,
    )


def _losses(work: _Work, data: Dataset) -> tuple[Floats, Floats]:
    """Losses of rows with and without the adapter, in nats per label token; each (rows,) float64."""
    done = from_first(lambda: {line["start"]: line for line in work.folder.lines(_LOSSES)})
    starts = range(0, len(data), _CHUNK)
    model: Any = _tuned(work) if any(start not in done for start in starts) else None
    batch = _WIDER * work.recipe.batch_size
    with stages(work.console) as progress:
        for start in starts:
            if start in done:
                continue
            progress("losses of the rows", start, len(data))
            chunk = data[start : start + _CHUNK]
            own = slice(rank(), None, world_size())  # each rank has a part of the chunk
            rows = list(zip(chunk["input_ids"][own], chunk["labels"][own], strict=True))
            part = torch.zeros(2, len(chunk["labels"]), dtype=torch.float64)
            with short_rows():
                results = [row_nll(model, rows, batch)]
                with model.disable_adapter():
                    results.append(row_nll(model, rows, batch))
            for place, result in enumerate(results):
                part[place, own] = torch.from_numpy(result.nll / np.maximum(result.tokens, 1))
            after, before = (mean_over_ranks(part, model_device(model)) * world_size()).tolist()
            done[start] = {"start": start, "after": after, "before": before}
            if rank() == 0:
                work.folder.append(_LOSSES, done[start])
    del model
    free()
    after_R, before_R = (np.concatenate([done[start][name] for start in starts]) for name in ("after", "before"))
    return after_R, before_R


def _tuned(work: _Work) -> Any:
    """Tune the model on the target without the unseen rows, unless an earlier call has, and load it with the adapter.

    It is loaded even after the training in this call, so that the losses of an interrupted call are the same.
    """
    recipe, folder = work.recipe, work.folder.path / _TUNING
    if not from_first(lambda: _has_finished(folder)):
        _tune(work, folder)
        free()
    source = work.source_of(recipe.model)
    with first_rank_first():
        model, _ = source.load(recipe.dtype, recipe.quantize)
    use_attention(model, recipe.attention)
    if torch.accelerator.is_available() and recipe.quantize is None:  # quantized weights are there already
        model = model.to(torch.accelerator.current_accelerator())
    return load_adapter(model, folder / "adapter", recipe.model)


def _tune(work: _Work, folder: Path) -> None:
    rows, recipe = work.rows, work.recipe
    same: dict[str, Any] = {name: getattr(recipe, name) for name in _SAME}
    others = [*rows.unseen, *rows.copies]
    if rank() == 0:
        work.folder.write(_UNSEEN, _csv(["place"], [[absolute_place(row.origin)] for row in others]))
    resume = from_first(lambda: _has_checkpoint(folder))
    seen = len(rows.target) - len(rows.unseen)
    work.console.print(f"training on {counted(seen, 'row')} of the target, to score the pool", markup=False)
    tuning = Recipe(
        **same,
        train=str(recipe.target),
        drop_rows=str(work.folder.path / _UNSEEN),
        steps=work.steps,
        out=str(folder),
        resume=resume,
    )
    try:
        tune(tuning, work.console, work.source_of)
    except TrainingError as error:  # without the advice to resume that training as a run
        cause = error.__cause__ if isinstance(error.__cause__, TrainingError) else error
        raise TrainingError(f"training on the rows of the target: {cause}") from error


def _has_finished(folder: Path) -> bool:
    """Whether the training on the target's rows has ended; an interrupted one leaves an adapter too."""
    return folder.exists() and RunFolder(folder).has_finished()


def _has_checkpoint(folder: Path) -> bool:
    """Whether that training can continue; without a checkpoint its folder is removed."""
    if folder.exists() and not RunFolder(folder).has_checkpoint():
        shutil.rmtree(folder)
    return folder.exists()


def _write(work: _Work, pool: Sequence[Row], selected: set[int], after: Floats, before: Floats) -> list[int]:
    """Write the results; returns the numbers of the selected rows among all rows of the pool's files."""
    folder, recipe, text, numbers = work.folder, work.recipe, io.StringIO(), list[int]()
    header = ["place", "score", "loss_after", "loss_before", "selected", "source", "prompt", "completion"]
    lines, columns = [], zip(scores(after, before), after, before, strict=True)
    for number, (row, source) in enumerate(zip(pool, sources(pool), strict=True)):
        losses = [f"{value:.5f}" for value in next(columns)]
        texts = [inert(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…") for text in (source, *text_of(row))]
        lines.append([row.origin, *losses, int(number in selected), *texts])
    folder.write(SCORES, _csv(header, lines))
    others = [row.origin for number, row in enumerate(pool) if number not in selected]
    dropped = [[absolute_place(place)] for place in (*others, *work.rows.also_target)]
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
