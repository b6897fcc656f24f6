"""Trainings of a sifting: on the pool, then on the target or on bad rows.

A training that has finished is not repeated, and an interrupted one continues.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from siftune.base.errors import DataError, TrainingError
from siftune.base.ranks import from_first, rank, wait_for_all, world_size
from siftune.base.text import counted
from siftune.data.read import load_rows, placed_records
from siftune.data.rows import Row, row_texts
from siftune.models.adapters.attach import adapts_shared_ends, is_quantized, load_adapter
from siftune.recipe.schema import SCORING, Recipe
from siftune.recipe.training_rows import Read
from siftune.sifting.pool import Few
from siftune.sifting.work import TUNING, Work, base_model
from siftune.train.folder.run_folder import RunFolder
from siftune.train.guards.memory import free
from siftune.train.run import train as tune

logger = logging.getLogger(__name__)

AVOID = "avoid"  # folder of what the bad rows score, and their name in `pool.PARTS`
POOL = "pool"  # run folder of the training on the pool, which precedes that on the few rows
SHAPE = ("rank", "alpha", "targets", "layers")  # settings of an adapter
_SEEN, _UNSEEN = "seen.jsonl", "unseen.jsonl"
_FURTHER = 20  # steps on the bad rows, after those on the pool (ours)
_AFTER = 0.5  # of the steps, at most, for the target's rows after those on the pool (ours)
_PASS = 0.5  # share of the task's rows on which the model is trained at most before it is trained on the target (ours)
# steps between measurements of the held-out rows, at most; measurements, at least; those without improvement (ours)
_EVERY, _MEASURED, _PATIENCE = 10, 6, 2


def prefix(few: Few) -> str:
    """Where the files of few rows are in the folder of a sifting: empty for the target's."""
    return "" if few.name == "target" else f"{few.name}/"


@contextmanager
def before_bad_rows(model: Any) -> Iterator[None]:
    """The model tuned on the pool, before the training on the bad rows."""
    model.set_adapter(POOL)
    try:
        yield
    finally:
        model.set_adapter("default")


def tuned_on_target(work: Work, few: Few, number: int, trained: Sequence[Row]) -> Any:
    """Tune a model that was tuned on the pool further on most of the target's rows, unless an earlier call has.

    The pool teaches the form of the answers and the classes of which the target has few rows. At most half of its rows
    train, each once, so that few wrong ones are learned by heart. The training on the target stops if the loss of the
    rows that it leaves out no longer falls, and its best weights remain. They are loaded even after a training in this
    call, so that the losses of an interrupted call are the same.

    Args:
        work: The sifting.
        few: The target.
        number: Of the training on the target.
        trained: Rows of the pool to train on first; none: the training on the target is the only one.
    """
    top = work.folder.path
    if trained:
        of_step = work.recipe.batch_size * work.recipe.accumulate * world_size()
        steps = min(work.steps, math.ceil(_PASS * len(trained) / of_step))
        _tune_on_pool(work, ".", trained, steps)
    folder = top / (TUNING if number == 0 else f"{TUNING}-{number}")
    seen, unseen = (of_training(number, name) for name in (_SEEN, _UNSEEN))
    origins = {row.origin for row in few.unseen[number]}
    rows = [row for row in few.rows if row.origin not in origins]
    again = _write_records(work, few, {seen: rows, unseen: few.unseen[number]})
    own = _further(work, top / POOL) if trained else _scoring(work)
    steps = math.ceil(_AFTER * work.steps) if trained else work.steps
    own |= {"train": str(top / seen), "eval": str(top / unseen), "steps": steps}
    if steps >= _MEASURED:
        own |= {"eval_every": min(_EVERY, steps // _MEASURED), "patience": _PATIENCE}
    read = Read({"train": again[seen], "eval": again[unseen]})
    _tune(work, folder, own, f"{counted(len(rows), 'row')} of the target", read)
    tuned = _loaded(work, folder)
    if is_quantized(tuned) or adapts_shared_ends(tuned):
        return tuned
    return tuned.merge_and_unload()  # the losses take three quarters of the time


def of_training(number: int, name: str) -> str:
    """Name of a file of the first or the second training on the target."""
    return f"{number}-{name}" if number else name


def _write_records(work: Work, few: Few, parts: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Write rows as they are in their file, as JSON lines, and read them again, to train on them.

    Args:
        work: The sifting.
        few: The target, or the bad rows.
        parts: Rows to write, by file.

    Returns:
        The rows of each file, with their places there.

    Raises:
        DataError: They would be read as other rows: the columns of a file's first row determine its format. Or the file
            has changed.
    """
    if rank() == 0:
        names = {row.origin: name for name, rows in parts.items() for row in rows}
        lines: dict[str, list[str]] = {name: [] for name in parts}
        for place, record in placed_records(few.file):
            if place in names:
                lines[names[place]].append(json.dumps(record, default=str) + "\n")
        for name, own in lines.items():
            work.folder.write(name, "".join(own))
    wait_for_all()
    again = {}
    for name, rows in parts.items():
        again[name] = load_rows(str(work.folder.path / name), columns=work.recipe.columns)
        if [*row_texts(again[name])] != [*row_texts(rows)]:
            raise DataError(
                f"the rows of {few.file} have different columns, or have changed since they were read: give all of "
                "them the same columns, or run the command again"
            )
    return again


def tuned_on_bad_rows(work: Work, few: Few) -> Any:
    """Tune a model that was tuned on the pool further on the bad rows, and load both adapters."""
    folder = work.folder.path / AVOID
    _tune_on_pool(work, AVOID, work.rows.pool, work.steps)
    unseen, seen = {row.origin for row in few.unseen[0]}, f"{AVOID}/{_SEEN}"
    rows = [row for row in few.rows if row.origin not in unseen]
    again = _write_records(work, few, {seen: rows})
    own = _further(work, folder / POOL) | {"steps": _FURTHER, "train": str(work.folder.path / seen)}
    read = Read({"train": again[seen]})
    _tune(work, folder / TUNING, own, f"{counted(len(rows), 'row')} of the bad rows", read)
    tuned = _loaded(work, folder / TUNING)
    tuned.load_adapter(str(folder / POOL / "adapter"), adapter_name=POOL, autocast_adapter_dtype=False)
    return tuned


def _tune_on_pool(work: Work, name: str, rows: Sequence[Row], steps: int) -> None:
    """Tune the model on rows of the pool, in the run folder `pool` of a folder of the sifting."""
    folder = work.folder.path / name
    if rank() == 0:
        folder.mkdir(exist_ok=True)
    wait_for_all()
    settings = {**_scoring(work), "train": work.recipe.train, "steps": steps}
    _tune(work, folder / POOL, settings, f"{counted(len(rows), 'row')} of the pool", Read({"train": rows}))


def _scoring(work: Work) -> dict[str, Any]:
    """Settings of a training that scores depend on."""
    return {name: getattr(work.recipe, name) for name in SCORING}


def _further(work: Work, folder: Path) -> dict[str, Any]:
    """Settings of a training that continues with the adapter of a run folder."""
    return {**_scoring(work), **from_run(folder)}


def from_run(folder: Path) -> dict[str, Any]:
    """Settings by which a recipe continues with the adapter of a run folder, which has its own shape."""
    return {**{name: getattr(Recipe, name) for name in SHAPE}, "from_adapter": str(folder)}


def _loaded(work: Work, folder: Path) -> Any:
    """Load the model with the adapter of a run folder."""
    return load_adapter(base_model(work), folder / "adapter", work.recipe.model)


def _tune(work: Work, folder: Path, settings: Mapping[str, Any], title: str, read: Read | None = None) -> None:
    """Train in a run folder, or continue there; a training that has finished is not repeated.

    Args:
        work: The sifting.
        folder: The run folder.
        settings: Settings of a recipe.
        title: The rows in messages.
        read: Rows that were read before.
    """
    if from_first(lambda: _has_finished(folder)):
        return
    resume = from_first(lambda: _has_checkpoint(folder))
    work.console.print(f"training on {title}, to score the pool", markup=False)
    try:
        tune(Recipe(**settings, out=str(folder), resume=resume), work.console, work.source_of, read)
    except TrainingError as error:  # without the advice to resume that training as a run
        cause = error.__cause__ if isinstance(error.__cause__, TrainingError) else error
        raise TrainingError(f"training on {title}: {cause}") from error
    free()


def _has_finished(folder: Path) -> bool:
    """Whether a training has ended; an interrupted one leaves an adapter too. One whose weights changed is removed."""
    if folder.exists() and (changed := RunFolder(folder).changed_weights()):
        logger.warning("%s is not what was trained: the training is repeated", folder / "adapter" / changed[0])
        shutil.rmtree(folder)
    return folder.exists() and RunFolder(folder).has_finished()


def _has_checkpoint(folder: Path) -> bool:
    """Whether that training can continue; without a checkpoint its folder is removed."""
    if folder.exists() and not RunFolder(folder).has_checkpoint():
        shutil.rmtree(folder)
    return folder.exists()
