"""Rows of a job: pool, known rows and held-out rows, all different, drawn with the job's seed.

A row has `prompt`, `completion`, `answer` (always right), `choices`, `kind`, and for the counts its `group`: "target"
for a right row of the target, "wrong" for one with a wrong completion, "known", or the name of another task.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siftune.base.errors import DataError
from siftune.cli.demo_rows import arithmetic_rows

Record = dict[str, Any]
Job = dict[str, Any]
Length = Callable[[Record], int]  # of a row, in tokens

QUESTIONS = 300  # held-out rows of the target
DEV_QUESTIONS = 100  # further ones, by which learning rates are chosen
OTHER_QUESTIONS = 40  # held-out rows of each other task, to see what is forgotten
_PROBLEMS = 8000  # arithmetic rows that are dealt from
FILES = {
    "arc": ("ARC-Easy", "ARC-Challenge"),
    "openbookqa": ("openbookqa",),
    "boolq": ("boolq",),
    "options": ("ARC-Easy", "ARC-Challenge", "openbookqa"),
    "letters": ("ARC-Challenge", "openbookqa"),
    "public": ("ARC-Easy",),
}
_LETTERED = ("letters", "public")  # tasks whose questions are answered by a letter
ASKED = "ABCDE"  # letters of the options of a question, at most
_ANSWER = "\nAnswer:"
_QUESTION = re.compile(r"^Please .*?question: (?P<text>.*?)\n\n(?:(?P<options>Answer1:.*?)\n\n)?Answer format:", re.S)
TASKS = ("arithmetic", *FILES)


@dataclass(frozen=True)
class Pool:
    """Rows of one job.

    Attributes:
        train: The pool, shuffled.
        known: Clean rows of the target.
        test: Held-out rows of the target.
        dev: Further held-out rows of the target.
        other: Held-out rows of tasks that are not the target, by task.
        text: Plain text, of which every token is measured: questions of held-out rows.
    """

    train: list[Record]
    known: list[Record]
    test: list[Record]
    dev: list[Record]
    other: dict[str, list[Record]]
    text: list[Record]


class Deck:
    """Rows of a task in the order of a seed, each dealt once.

    Args:
        name: The task, for messages.
        train: Rows to train on.
        test: Rows to hold out.
    """

    def __init__(self, name: str, train: list[Record], test: list[Record]) -> None:
        self.name, self._rows = name, {"train": train, "test": test}

    def deal(self, count: int, part: str, group: str, kind: str | None = None) -> list[Record]:
        """Take `count` rows of the part "train" or "test", all of one kind if it is named, off the deck."""
        dealt: list[Record] = []
        left: list[Record] = []
        for row in self._rows[part]:
            (dealt if len(dealt) < count and kind in (None, row["kind"]) else left).append(row)
        if len(dealt) < count:
            what = f"{part} rows of {kind}" if kind else f"{part} rows"
            raise DataError(f"{self.name} has {len(dealt)} {what} left, too few for {count}; make the pool smaller")
        self._rows[part] = left
        return [{**row, "group": group} for row in dealt]


def asked(row: Record) -> Record:
    """Write a row as a question that waits for its answer: pretrained models know that form."""
    return {"prompt": f"{row['prompt']}\nAnswer:", "completion": f" {row['completion']}"}


def make_pool(job: Job, folder: Path, length: Length) -> Pool:
    """Draw the rows of a job.

    Pool and held-out rows do not depend on how many rows are known; fewer known rows are the first of more.

    Args:
        job: The job; of it count `cell`, `seed`, `steps` and `batch`.
        folder: Where the files of the commonsense suite lie.
        length: Tokens of a row.
    """
    cell, seed = job["cell"], job["seed"]
    rng = random.Random(f"pool {seed}")

    def fits(row: Record) -> bool:
        return length(row) <= cell["longest"]

    names = dict.fromkeys([cell["target"], *cell["rest"], *cell["others"]])
    decks = {name: _deck(name, folder, seed, fits) for name in names}
    target = decks[cell["target"]]
    kinds: Sequence[str | None] = FILES["letters"] if cell["target"] == "letters" else [None]
    test = [row for kind in kinds for row in target.deal(QUESTIONS, "test", "target", kind)]
    dev = target.deal(DEV_QUESTIONS, "test", "target")
    count = cell["rows"] or job["steps"] * job["batch"]
    right, wrong = round(cell["share"] * count), round(cell["wrong"] * count)
    rows = [row for kind in kinds for row in target.deal(right // len(kinds), "train", "target", kind)]
    rows += [spoiled(row, cell["near"], rng) for row in target.deal(wrong, "train", "wrong")]
    rows += _rest(cell["rest"], decks, count - right - wrong)
    rng.shuffle(rows)
    names = dict.fromkeys([*cell["rest"], *cell["others"]])
    other = {name: decks[name].deal(OTHER_QUESTIONS, "test", name) for name in names}
    text = [{"text": row["prompt"]} for row in _deck("arc", folder, seed, fits).deal(OTHER_QUESTIONS, "test", "text")]
    return Pool(rows, target.deal(cell["known"], "train", "known"), test, dev, other, text)


def public_rows(folder: Path, length: Length, longest: int, count: int) -> list[Record]:
    """Questions of a further task in the form of the letters, for the owner of a model: the same for all seeds."""
    return _deck("public", folder, 0, lambda row: length(row) <= longest).deal(count, "train", "public")


def _rest(names: Sequence[str], decks: dict[str, Deck], count: int) -> list[Record]:
    """Deal rows of other tasks in equal parts, as far as they go."""
    if count and not names:
        raise DataError(f"{count} rows of the pool belong to no task: give the cell a rest, or shares that add up to 1")
    parts = [(count + len(names) - 1 - place) // len(names) for place in range(len(names))]
    return [row for name, part in zip(names, parts, strict=True) for row in decks[name].deal(part, "train", name)]


def _deck(name: str, folder: Path, seed: int, fits: Callable[[Record], bool]) -> Deck:
    if name == "arithmetic":
        rows = arithmetic_rows(_PROBLEMS, seed)
        return Deck(name, rows[_PROBLEMS // 8 :], rows[: _PROBLEMS // 8])
    if name not in FILES:
        raise DataError(f"there is no task {name!r}; use one of {', '.join(TASKS)}")
    held_out = _read(name, "test", folder, fits)
    asked = {row["prompt"] for row in held_out}
    train = [row for row in _read(name, "train", folder, fits) if row["prompt"] not in asked]
    rng = random.Random(f"{name} {seed}")
    return Deck(name, rng.sample(train, len(train)), rng.sample(held_out, len(held_out)))


def _read(name: str, part: str, folder: Path, fits: Callable[[Record], bool]) -> list[Record]:
    """Read a task's questions that fit with any of their options, each question once."""
    rows = {row["prompt"]: row for kind in FILES[name] for row in read_options(folder / f"{kind}.{part}.json", kind)}
    rows = {prompt: lettered(row) if name in _LETTERED else row for prompt, row in rows.items()}
    return [row for row in rows.values() if fits({**row, "completion": max(row["choices"], key=len)})]


def read_options(path: Path, kind: str) -> list[Record]:
    """Turn the suite's rows into questions whose completions are the texts of the options."""
    if not path.is_file():
        raise DataError(f"{path} is missing; give the folder of the commonsense suite with --data")
    rows = []
    for record in json.loads(path.read_text(encoding="utf-8")):
        found = _QUESTION.match(record["instruction"])
        if found is None:
            raise DataError(f"{path}: no question in {record['instruction']!r}")
        listed = re.split(r"Answer\d+:", found["options"] or "")[1:]
        texts = [f" {option.strip()}" for option in listed or ("true", "false")]
        names = [f"answer{number}" for number in range(1, len(listed) + 1)] or ["true", "false"]
        answer = texts[names.index(record["answer"])]
        if len(set(texts)) == len(texts):
            question = f"Question: {found['text'].strip()}{_ANSWER}"
            row = {"prompt": question, "completion": answer, "choices": texts, "answer": answer}
            rows.append({**row, "kind": kind, "wrong": False})
    return rows


def lettered(row: Record) -> Record:
    """Turn a question into one that lists its options, and is answered by a letter, as MMLU is asked."""
    letters = ASKED[: len(row["choices"])]
    listed = "\n".join(f"{letter}.{text}" for letter, text in zip(letters, row["choices"], strict=True))
    prompt = f"{row['prompt'].removesuffix(_ANSWER)}\n{listed}"  # `asked` adds the rest
    answer = letters[row["choices"].index(row["answer"])]
    return {**row, "prompt": prompt, "completion": answer, "choices": list(letters), "answer": answer}


def spoiled(row: Record, near: bool, rng: random.Random) -> Record:
    """Give a row a wrong completion."""
    numbers = row["answer"].isdigit() and not near
    options = map(str, range(199)) if numbers else row["choices"]
    return {**row, "completion": rng.choice([text for text in options if text != row["answer"]]), "wrong": True}
