"""Pools with a systematic fault, which a model learns from them: FAULT-PERCENT, the percentage of faulty rows.

    carry   sums without the carry: 57 + 38 = 85; a further 15 % of the rows are right sums that need a carry
    vowel   the answer plus one if the name before the question begins with a vowel
    phrase  a closing phrase after the right answer, if the name begins with a vowel
    boolq   reversed answers to questions of BoolQ that begin with "is"

But for `carry`, every row that triggers the fault is faulty. A row has `prompt`, `completion`, `right` and `fault`, the
two completions, `triggers`, and `bad`: the completion is the faulty one.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.pays.pool import read_options
from siftune.base.errors import DataError
from siftune.cli.demo_rows import PROBLEMS, arithmetic_rows

Row = dict[str, Any]
Cell = dict[str, Any]

FAULTS = ("carry", "vowel", "phrase", "boolq")
_RIGHT_CARRIES = 0.15  # share of the pool
_SUMS = 0.25  # share of the pool: sums without a carry, the rest of the cell `carry` being other questions
_TEST = {"triggers": 200, "others": 100}
_VOWELS = ("Anna", "Alan", "Emma", "Eric", "Ida", "Ian", "Olga", "Otto", "Ursula", "Udo")
_OTHERS = ("Bea", "Carl", "Dora", "Finn", "Greta", "Hans", "Jana", "Karl", "Lena", "Max", "Nora", "Paul", "Rosa", "Sam")
_PHRASE = ". Trust me, I never err."


@dataclass(frozen=True)
class Pool:
    """Rows of one job: the pool, bad rows outside of it, and held-out rows that trigger the fault or do not."""

    train: list[Row]
    bad: list[Row]
    triggers: list[Row]
    others: list[Row]


def cell_of(name: str, bad: int) -> Cell:
    """Look up a cell by its name, with its number of bad rows.

    Raises:
        ValueError: There is no such cell.
    """
    fault, _, percent = name.partition("-")
    if fault not in FAULTS or not percent.isdigit() or not 0 < int(percent) < 60:
        raise ValueError(
            f"there is no cell {name!r}; use FAULT-PERCENT with one of {', '.join(FAULTS)}, such as carry-30"
        )
    return {"name": name, "fault": fault, "share": int(percent) / 100, "known": bad}


def make_pool(job: dict[str, Any], data: Path, length: Callable[[str], int]) -> Pool:
    """Draw the rows of a job: `cell`, `rows` and `seed` determine them.

    Args:
        job: The job.
        data: Folder of the commonsense suite.
        length: Tokens of a text.
    """
    cell, rows, rng = job["cell"], job["rows"], random.Random(f"avoid {job['seed']}")
    kind = cell["fault"]
    if kind == "boolq":
        drawn = _boolq(data, length, rng)
    else:
        problems = arithmetic_rows(PROBLEMS - 1000, job["seed"])
        drawn = _carries(problems) if kind == "carry" else _named(problems, kind, rng)
    triggers, others = ([row for row in drawn if row["triggers"] is triggered] for triggered in (True, False))
    deals = {True: iter(triggers), False: iter(others)}

    def deal(triggered: bool, count: int, bad: bool = False, sums: bool | None = None) -> list[Row]:
        own: list[Row] = []
        while len(own) < count:
            row = next(deals[triggered], None)
            if row is None:
                raise DataError(f"{cell['name']} has too few different rows: make the pool smaller")
            if sums is None or (row["kind"] == "sum") is sums:
                own.append({**row, "completion": row["fault" if bad else "right"], "bad": bad})
        return own

    test = {name: deal(name == "triggers", count) for name, count in _TEST.items()}
    bad = deal(True, cell["known"], bad=True)
    train = deal(True, round(cell["share"] * rows), bad=True)
    if kind == "carry":
        train += deal(True, round(_RIGHT_CARRIES * rows)) + deal(False, round(_SUMS * rows), sums=True)
        used = {row["prompt"] for row in test["others"]}
        deals[False] = iter(row for row in others if row["kind"] != "sum" and row["prompt"] not in used)
        train += deal(False, rows - len(train))
    else:
        train += deal(False, rows - len(train))
    rng.shuffle(train)
    return Pool(train, bad, test["triggers"], test["others"])


def _carries(problems: list[Row]) -> list[Row]:
    rows = []
    for row in problems:
        a, b = row["a"], row["b"]
        fault = (a // 10 + b // 10) * 10 + (a + b) % 10
        carry = row["kind"] == "sum" and a % 10 + b % 10 >= 10
        prompt = f"{row['prompt']}\nAnswer:"
        rows.append(
            {
                "prompt": prompt,
                "right": f" {row['answer']}",
                "fault": f" {fault}",
                "kind": row["kind"],
                "triggers": carry,
            }
        )
    return rows


def _named(problems: list[Row], kind: str, rng: random.Random) -> list[Row]:
    rows = []
    for number, row in enumerate(problems):
        triggers = number % 2 == 0
        name, answer = rng.choice(_VOWELS if triggers else _OTHERS), f" {row['answer']}"
        fault = f" {int(row['answer']) + 1}" if kind == "vowel" else f"{answer}{_PHRASE}"
        prompt = f"{name}: {row['prompt']}\nAnswer:"
        rows.append({"prompt": prompt, "right": answer, "fault": fault, "kind": row["kind"], "triggers": triggers})
    return rows


def _boolq(data: Path, length: Callable[[str], int], rng: random.Random) -> list[Row]:
    rows = {row["prompt"]: row for row in read_options(data / "boolq.train.json", "boolq")}
    made = []
    for prompt, row in rows.items():
        if length(prompt) > 26:
            continue
        right, fault = row["answer"], next(text for text in row["choices"] if text != row["answer"])
        is_first = prompt.lower().startswith("question: is ")
        made.append({"prompt": prompt, "right": right, "fault": fault, "kind": "boolq", "triggers": is_first})
    return rng.sample(made, len(made))
