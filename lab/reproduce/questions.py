"""Files with the rows and questions of the suite, made from a folder with the rows of LLM-Adapters.

OUT/data/
  train.jsonl, heldout.jsonl    `prompt` and `completion`
  TASK.jsonl                    the questions: also `choices`, and `answer`, the position of the correct one

The folder has `TASK.test.json`, `TASK/test.json` or `dataset/TASK/test.json` for each task, and for training
`commonsense_170k.json`, also in `ft-training_set/`, or without it `TASK.train.json` for each.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from siftune.base.errors import DataError
from siftune.base.files import write_beside
from siftune.base.text import counted
from siftune.data.read import load_rows
from siftune.data.rows import Row

TASKS = {  # name -> title in tables
    "boolq": "BoolQ", "piqa": "PIQA", "social_i_qa": "SIQA", "hellaswag": "HellaSwag", "winogrande": "WinoGrande",
    "ARC-Easy": "ARC-e", "ARC-Challenge": "ARC-c", "openbookqa": "OBQA",
}  # fmt: skip
_JOINT = ("commonsense_170k.json", "ft-training_set/commonsense_170k.json")  # the training rows of all tasks
_HELD_OUT = 120
_SEED = 42  # of the rows that are held out: the same for all methods and seeds

# Stanford Alpaca's prompt; LLM-Adapters' code indents its lines, which is left out here
_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
# ours: an answer's text follows, as lm-evaluation-harness asks ARC, or its letter, as it asks MMLU
_CLOZE = "Question: {}\nAnswer:"
_LISTED = "Question: {}\n{}\nAnswer:"
LETTERS = "ABCDEFGH"

Record = dict[str, Any]
Wording = Literal["names", "letters", "texts"]


def prepare_files(
    tasks: Sequence[str], data: Path, out: Path, limit: int | None, questions: int | None, answers: Wording = "names"
) -> None:
    """Write the files that are not there yet.

    Args:
        tasks: Tasks that are evaluated, and trained on if each has a file of its own.
        data: The folder with the rows.
        out: The folder `OUT/data`.
        limit: Number of training rows, drawn evenly; None: all.
        questions: Number of questions of each task, the first ones; None: all.
        answers: How options are answered: by "names", such as answer1, as the papers ask; by "letters", such as A; or
            by "texts": options are not listed, and an answer is the text of the correct one.

    Raises:
        DataError: Rows are missing or cannot be read.
    """
    if not ((out / "train.jsonl").exists() and (out / "heldout.jsonl").exists()):
        rows = _training_rows(tasks, data)
        if len(rows) <= _HELD_OUT:
            raise DataError(f"{data} has {counted(len(rows), 'training row')}, of which {_HELD_OUT} are held out")
        random.Random(_SEED).shuffle(rows)
        _write(out / "heldout.jsonl", [_row(row, answers) for row in rows[:_HELD_OUT]])
        _write(out / "train.jsonl", [_row(row, answers) for row in rows[_HELD_OUT:][:limit]])
    for task in tasks:
        if not (out / f"{task}.jsonl").exists():
            names = [f"{task}.test.json", f"{task}/test.json", f"dataset/{task}/test.json"]
            file = _first_file(data, names)
            _refuse_missing(data, {task: file}, "test", names[0])
            _write(out / f"{task}.jsonl", [_question(row, answers) for row in load_rows(str(file))[:questions]])


def trained_on(tasks: Sequence[str], data: Path) -> list[str]:
    """Tasks whose rows are trained on: all, or those that are evaluated if each has a file of its own."""
    return list(TASKS if _first_file(data, _JOINT) else tasks)


def options_of(instruction: str) -> list[str]:
    r"""Names of a question's options, after "Answer format:" with slashes between; empty without them.

    Example:
        >>> options_of("Is it so?\n\nAnswer format: true/false")
        ['true', 'false']
    """
    _, mark, names = instruction.rpartition("Answer format:")
    return [name.strip() for name in names.split("/")] if mark else []


def texts_of(instruction: str) -> tuple[str, list[str]]:
    r"""A question by itself, and the texts of its options; their names if they have no texts (true, false).

    Raises:
        ValueError: The options are not listed under their names.

    Example:
        >>> texts_of("Please choose: Hot?\n\nAnswer1: ice Answer2: fire\n\nAnswer format: answer1/answer2")
        ('Hot?', ['ice', 'fire'])
    """
    names, (asked, _, _) = options_of(instruction), instruction.rpartition("Answer format:")
    if not any(name[-1:].isdigit() for name in names):
        return _without_lead(asked), names
    marks = [f"{name.capitalize()}:" for name in names]
    question, first, rest = asked.rpartition(f"\n\n{marks[0]}")
    if not first:
        raise ValueError(f"{marks[0]} begins no list of options")
    texts = []
    for mark in marks[1:]:
        if rest.count(mark) != 1:
            raise ValueError(f"{mark} stands {rest.count(mark)} times in its list of options")
        text, _, rest = rest.partition(mark)
        texts.append(text.strip())
    return _without_lead(question), [*texts, rest.strip()]


def listed(texts: Sequence[str]) -> str:
    """Texts of options, each after its letter on a line of its own; a text begins with a space."""
    return "\n".join(f"{letter}.{text}" for letter, text in zip(LETTERS, texts, strict=False))


def _without_lead(asked: str) -> str:
    """A question without "Please choose the correct answer to the question:"."""
    lead, colon, question = asked.partition(": ")
    return (question if colon and lead.startswith("Please ") else asked).strip()


def _training_rows(tasks: Sequence[str], data: Path) -> list[Row]:
    joint = _first_file(data, _JOINT)
    if joint is not None:
        return load_rows(str(joint))
    names = ("{}.train.json", "{}/train.json", "dataset/{}/train.json")
    files = {task: _first_file(data, [name.format(task) for name in names]) for task in tasks}
    _refuse_missing(data, files, "train", f"{_JOINT[0]}, or TASK.train.json for each task")
    return [row for file in files.values() for row in load_rows(str(file))]


def _first_file(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _refuse_missing(folder: Path, files: dict[str, Path | None], kind: str, needed: str) -> None:
    missing = [task for task, file in files.items() if file is None]
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: give --data a folder with {needed}")
    if missing:
        raise DataError(
            f"{folder} has no {kind} rows of {', '.join(missing)}: put {needed} there, or name the tasks that it has "
            "with --tasks"
        )


def _row(row: Row, answers: Wording) -> Record:
    """A row in the words that the models are trained with."""
    if answers != "names":
        question, texts, right = _question_and_texts(row)
        if answers == "texts":
            return {"prompt": _CLOZE.format(question), "completion": texts[right]}
        return {"prompt": _LISTED.format(question, listed(texts)), "completion": f" {LETTERS[right]}"}
    return {"prompt": _PROMPT.format(row.prompt[0].content), "completion": row.completion}


def _question(row: Row, answers: Wording) -> Record:
    """The same with its options and the position of the correct one."""
    options, right = _options(row)
    choices = [f"the correct answer is {option}" for option in options]
    if answers == "letters":
        choices = [f" {letter}" for letter in LETTERS[: len(options)]]
    if answers == "texts":
        choices = _question_and_texts(row)[1]
        if len(set(choices)) < len(choices) or not all(choice.strip() for choice in choices):
            raise DataError(f"{row.origin}: an option is empty, or two are equal: leave the row out")
    return {**_row(row, answers), "choices": choices, "answer": right}


def _options(row: Row) -> tuple[list[str], int]:
    """Names of a row's options, and the position of the correct one."""
    answer, options = str(row.extra.get("answer", "")).strip(), options_of(row.prompt[0].content)
    if answer not in options:
        raise DataError(f"{row.origin}: the answer {answer!r} is none of its options {', '.join(options) or '(none)'}")
    return options, options.index(answer)


def _question_and_texts(row: Row) -> tuple[str, list[str], int]:
    """A row's question by itself, the completion of each option, and the position of the correct one."""
    _, right = _options(row)
    try:
        question, texts = texts_of(row.prompt[0].content)
    except ValueError as error:
        raise DataError(f"{row.origin}: {error}: leave the row out") from error
    if not question or not texts[right]:
        raise DataError(f"{row.origin}: its {'right option' if question else 'question'} is empty: leave the row out")
    return question, [f" {text}" for text in texts], right


def _write(path: Path, records: Sequence[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_beside(path) as [beside]:
        beside.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")
