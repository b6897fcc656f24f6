"""Files with the rows and questions of offsite-tuning's tasks, from a folder or from the hub.

OUT/data/
  TASK.train.jsonl, TASK.heldout.jsonl    `prompt` and `completion`
  TASK.jsonl                              the questions: also `choices` and `answer`, or the texts that are `accepted`
  calibration.jsonl                       training rows of all tasks, for making kits

A folder has `TASK.train.jsonl` and `TASK.test.jsonl` (or .json, .parquet, .csv), in the columns that the hub has.
"""

import random
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lab.reproduce.harness import HARNESS, Question
from lab.reproduce.protocol import Suite
from lab.reproduce.rows import HUB, found_in, other_way, records, refuse_few, write_rows
from lab.reproduce.tasks import Task
from siftune.base.errors import DataError

CALIBRATION = "calibration.jsonl"
CALIBRATION_ROWS = 128  # ours
_SEED = 42  # of the rows that are held out, and of those that calibrate
_ENDINGS = ("jsonl", "json", "parquet", "csv")


def prepare_tasks(
    suite: Suite, tasks: Sequence[str], data: str, out: Path, limit: int | None, asked: int | None
) -> None:
    """Write the files that are not there yet: see above.

    Args:
        suite: The suite.
        tasks: Those of its tasks that are used.
        data: A folder with TASK.train.jsonl and TASK.test.jsonl, in the columns of the hub; or "hub".
        out: The folder `OUT/data`.
        limit: Use only this many training rows of each task, drawn evenly; None: all.
        asked: Ask only the first N questions of each task.

    Raises:
        DataError: Rows are missing or cannot be read; the message says which and what to do.
    """
    some: list[Question] = []
    for task in tasks:
        if not (out / f"{task}.train.jsonl").exists():
            rows = _questions(task, data, "train")
            refuse_few(suite, f"{data}: {task}", len(rows))
            random.Random(_SEED).shuffle(rows)
            write_rows(out / f"{task}.heldout.jsonl", rows[: suite.held_out])
            write_rows(out / f"{task}.train.jsonl", rows[suite.held_out :][:limit])
        if not (out / f"{task}.jsonl").exists():
            write_rows(out / f"{task}.jsonl", _questions(task, data, "test")[:asked])
    if not (out / CALIBRATION).exists():
        for task in tasks:
            some += islice(records(str(out / f"{task}.train.jsonl")), CALIBRATION_ROWS)
        random.Random(_SEED).shuffle(some)
        keys = ("prompt", "completion")
        write_rows(out / CALIBRATION, [{key: row[key] for key in keys} for row in some[:CALIBRATION_ROWS]])


def _questions(task: str, data: str, part: str) -> list[Question]:
    """Rows of a task in the harness's words."""
    one = HARNESS[task]
    if data == HUB:
        with other_way():
            return _read(one, records(one.hub, "train" if part == "train" else one.split), f"{one.hub} {part}")
    names = [f"{task}.{part}.{ending}" for ending in _ENDINGS]
    file = found_in(data, names)
    if not Path(data).expanduser().is_dir():
        raise DataError(f"{data} is no folder: give --data a folder with {names[0]}, or hub where there is a network")
    if file is None:
        raise DataError(
            f"{data} has no {part} rows of {task}: put {names[0]} there, in the columns of {one.hub} on the hub, or "
            "name the tasks that it has with --tasks"
        )
    return _read(one, records(str(file)), str(file))


def _read(task: Task, records: Iterable[Any], name: str) -> list[Question]:
    made = []
    for number, record in enumerate(records, 1):
        try:
            made.append(task.question(record))
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise DataError(
                f"{name} row {number}: it is not as {task.hub} has its rows ({type(error).__name__}: {error}); "
                "give it the columns that are there"
            ) from error
    return made
