"""Files with the rows and questions of a protocol, from a folder or from the hub.

OUT/data/
  train.jsonl, heldout.jsonl    `prompt` and `completion`
  TASK.jsonl                    the questions: also `answer`, and `choices` where there are options

A folder has the rows of LLM-Adapters: `TASK.test.json`, `TASK/test.json` or `dataset/TASK/test.json` for each task,
and for training `JOINT.json`, also in `ft-training_set/`, or where that is not there `TASK.train.json` for each.
"""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lab.reproduce.answer_text import last_number
from lab.reproduce.protocol import Suite
from lab.reproduce.tasks import CLOZE, PROMPT, TASKS, options_of, texts_of
from siftune.base.errors import DataError
from siftune.base.files import write_beside
from siftune.base.text import counted
from siftune.data.read import load_rows, placed_records
from siftune.data.rows import Row, rows_from

HUB = "hub"
_SEED = 42  # of the rows that are held out: the same for all methods and seeds

Record = dict[str, Any]
Wording = Literal["names", "texts"]


def prepare_files(
    suite: Suite, tasks: Sequence[str], data: str, out: Path, limit: int | None, asked: int | None,
    answers: Wording = "names",
) -> None:  # fmt: skip
    """Write the files that are not there yet.

    Args:
        suite: The suite.
        tasks: Those of its tasks that are asked, and trained on where each has a file of its own.
        data: A folder, or "hub".
        out: The folder `OUT/data`.
        limit: Use only this many training rows, drawn evenly; None: all.
        asked: Ask only the first N questions of each task.
        answers: "names", as the papers ask, or "texts": options are not listed, and an answer is what the right one
            says.

    Raises:
        DataError: Rows are missing or cannot be read; the message says which and what to do.
    """
    if not ((out / "train.jsonl").exists() and (out / "heldout.jsonl").exists()):
        rows = _training(suite, tasks, data)
        refuse_few(suite, data, len(rows))
        random.Random(_SEED).shuffle(rows)
        write_rows(out / "heldout.jsonl", [_asked(row, answers) for row in rows[: suite.held_out]])
        write_rows(out / "train.jsonl", [_asked(row, answers) for row in rows[suite.held_out :][:limit]])
    for task in tasks:
        if not (out / f"{task}.jsonl").exists():
            rows = _questions(task, data)[:asked]
            write_rows(out / f"{task}.jsonl", [_question(row, task, answers) for row in rows])


def trained_on(suite: Suite, tasks: Sequence[str], data: str) -> list[str]:
    """The tasks whose rows are trained on: all, or where each has a file of its own those that are asked."""
    one_file = data == HUB or found_in(data, _joint(suite)) is not None
    return list(suite.tasks if one_file else tasks)


def refuse_few(suite: Suite, data: str, rows: int) -> None:
    """Refuse rows of which none would be left to train on."""
    if rows <= suite.held_out:
        raise DataError(f"{data} has {counted(rows, 'training row')}, of which {suite.held_out} are held out")


def _training(suite: Suite, tasks: Sequence[str], data: str) -> list[Row]:
    if data == HUB:
        if suite.hub is None:
            raise DataError(
                f"the training rows {suite.joint} are under no known name on the hub: give --data FOLDER with "
                f"{suite.joint}.json in it"
            )
        with other_way():
            return load_rows(suite.hub, "train")
    joint = found_in(data, _joint(suite))
    if joint is not None:
        return load_rows(str(joint))
    names = ("{}.train.json", "{}/train.json", "dataset/{}/train.json")
    files = {task: found_in(data, [name.format(task) for name in names]) for task in tasks}
    _refuse_missing(data, files, "train", f"{suite.joint}.json, or TASK.train.json for each task")
    return [row for file in files.values() for row in load_rows(str(file))]


def _joint(suite: Suite) -> list[str]:
    return [f"{suite.joint}.json", f"ft-training_set/{suite.joint}.json"]


def _questions(task: str, data: str) -> list[Row]:
    if data == HUB:
        one = TASKS[task]
        with other_way():
            return rows_from((one.question(record) for record in records(one.hub, one.split)), one.hub)
    file = found_in(data, [f"{task}.test.json", f"{task}/test.json", f"dataset/{task}/test.json"])
    _refuse_missing(data, {task: file}, "test", f"{task}.test.json")
    return load_rows(str(file))


def records(source: str, split: str = "train") -> Iterator[Any]:
    """Records of a file or hub data set, with any columns; a record that cannot be read is an error."""
    for _, record in placed_records(source, split):
        if isinstance(record, DataError):
            raise record
        yield record


@contextmanager
def other_way() -> Iterator[None]:
    """Say what to do where the hub gives nothing."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{str(error).rstrip('.')}; or give --data FOLDER with the papers' rows") from error


def found_in(folder: str, names: Sequence[str]) -> Path | None:
    """The first file of these names that a folder has."""
    return next((path for name in names if (path := Path(folder).expanduser() / name).is_file()), None)


def _refuse_missing(folder: str, files: dict[str, Path | None], kind: str, wanted: str) -> None:
    missing = [task for task, file in files.items() if file is None]
    if not Path(folder).expanduser().is_dir():
        raise DataError(f"{folder} is no folder: give --data a folder with {wanted}, or hub where there is a network")
    if missing:
        raise DataError(
            f"{folder} has no {kind} rows of {', '.join(missing)}: put {wanted} there, or name the tasks that it has "
            "with --tasks"
        )


def _asked(row: Row, answers: Wording) -> Record:
    """A row in the words that the models are trained with."""
    if answers == "texts":
        question, texts, right = _told(row)
        return {"prompt": CLOZE.format(question), "completion": texts[right]}
    return {"prompt": PROMPT.format(row.prompt[0].content), "completion": row.completion}


def _question(row: Row, task: str, answers: Wording) -> Record:
    """The same with its answer, and with its options where there are any."""
    reader = TASKS[task].reader
    if reader != "option":
        answer = str(row.extra.get("answer", "")).strip()
        if last_number(answer) is None if reader == "number" else answer not in tuple("ABCDE"):
            wanted = "a number" if reader == "number" else "a letter from A to E"
            raise DataError(f"{row.origin}: the answer is {answer!r}: give {wanted} in the column answer")
        return {**_asked(row, answers), "answer": answer}
    options, right = _options(row)
    choices = [f"the correct answer is {option}" for option in options]
    if answers == "texts":
        choices = _told(row)[1]
        if len(set(choices)) < len(choices) or not all(choice.strip() for choice in choices):
            raise DataError(f"{row.origin}: an option is empty, or two are equal: leave the row out")
    return {**_asked(row, answers), "choices": choices, "answer": right}


def _options(row: Row) -> tuple[list[str], int]:
    """The names of a row's options, and the place of the right one."""
    answer, options = str(row.extra.get("answer", "")).strip(), options_of(row.prompt[0].content)
    if answer not in options:
        raise DataError(f"{row.origin}: the answer {answer!r} is none of its options {', '.join(options) or '(none)'}")
    return options, options.index(answer)


def _told(row: Row) -> tuple[str, list[str], int]:
    """A row's question by itself, what follows it with each option, and the place of the right one."""
    _, right = _options(row)
    try:
        question, texts = texts_of(row.prompt[0].content)
    except ValueError as error:
        raise DataError(f"{row.origin}: {error}: leave the row out") from error
    if not question or not texts[right]:
        raise DataError(f"{row.origin}: its {'right option' if question else 'question'} is empty: leave the row out")
    return question, [f" {text}" for text in texts], right


def write_rows(path: Path, records: Sequence[Record]) -> None:
    """Write a .jsonl file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_beside(path) as [beside]:
        beside.write_text("".join(_lines(records)), encoding="utf-8")


def _lines(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        yield json.dumps(record, ensure_ascii=False) + "\n"
