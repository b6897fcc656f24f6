"""Seeded tasks with checkable answers: arithmetic on two-digit numbers, alone or in a pool with other tasks.

The demo and the laboratory use them. They need no download, and every answer can be checked. There are four kinds of
question, equally often: the sum, the difference, the larger and the smaller of two different numbers from 10 to 99.

In the mixed pool the task that counts is the smaller part, as in collected pools: a quarter are right rows of
arithmetic, a quarter rows of arithmetic with a wrong answer, and the rest other tasks (reversing digits, sorting,
counting on).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from siftune.base.errors import DataError
from siftune.data.target import SOURCE

KINDS = ("sum", "difference", "larger", "smaller")

_WORDINGS = {
    "sum": ("What is {a} + {b}?", "Add {a} and {b}.", "Sum of {a} and {b}?"),
    "difference": ("What is {high} - {low}?", "Subtract {low} from {high}.", "Difference of {a} and {b}?"),
    "larger": ("Which is larger, {a} or {b}?", "Larger of {a} and {b}?", "Maximum of {a} and {b}?"),
    "smaller": ("Which is smaller, {a} or {b}?", "Smaller of {a} and {b}?", "Minimum of {a} and {b}?"),
}
_NUMBERS = range(10, 100)
_PAIRS = [(low, high) for low in _NUMBERS for high in _NUMBERS if low < high]
PROBLEMS = len(KINDS) * len(_PAIRS)  # all that there are

Problem = tuple[str, int, int]  # kind, lower number, higher number


def arithmetic_rows(n: int, seed: int, exclude: Iterable[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Draw `n` different questions with their answers.

    Args:
        n: number of rows; the four kinds differ in number by at most one.
        seed: the same arguments give the same rows.
        exclude: rows whose problems must not come again, whatever the wording or the order of the numbers.

    Returns:
        Rows with `prompt`, `completion` and `answer` (the same number as a string), `choices` (4 different strings,
        the answer among them), `kind`, `a`, `b` and `wrong`, which is False.

    Raises:
        DataError: there are fewer different problems left than `n`.
    """
    rng = random.Random(seed)
    seen = {_problem(row) for row in exclude or ()}
    problems = [problem for i, kind in enumerate(KINDS) for problem in _draw(rng, kind, _share(n, i), seen)]
    rng.shuffle(problems)
    return [_row(rng, problem) for problem in problems]


def _problem(row: dict[str, Any]) -> Problem:
    """Identify the problem of a row, whatever its wording and the order of its numbers."""
    return row["kind"], min(row["a"], row["b"]), max(row["a"], row["b"])


def _share(n: int, index: int) -> int:
    """Number of rows, of `n`, for the kind `index`."""
    return (n + len(KINDS) - 1 - index) // len(KINDS)


def _draw(rng: random.Random, kind: str, count: int, seen: set[Problem]) -> list[Problem]:
    """Draw `count` different problems of one kind that are not in `seen`."""
    pool = [(kind, low, high) for low, high in _PAIRS if (kind, low, high) not in seen]
    if count > len(pool):
        raise DataError(
            f"{count} arithmetic rows of the kind {kind!r} were asked for, but only {len(pool)} different "
            f"problems are left; ask for at most {len(pool) * len(KINDS)} rows in all"
        )
    return rng.sample(pool, count)


def _row(rng: random.Random, problem: Problem) -> dict[str, Any]:
    """Word one problem, with its choices and its answer."""
    kind, low, high = problem
    a, b = rng.sample((low, high), 2)
    answer = _answer(problem)
    others = rng.sample(_distractors(problem, answer), 3)
    choices = [str(choice) for choice in rng.sample([answer, *others], 4)]
    return {
        "prompt": rng.choice(_WORDINGS[kind]).format(a=a, b=b, low=low, high=high),
        "completion": str(answer),
        "answer": str(answer),
        "choices": choices,
        "kind": kind,
        "a": a,
        "b": b,
        "wrong": False,
    }


def _answer(problem: Problem) -> int:
    kind, low, high = problem
    return {"sum": low + high, "difference": high - low, "larger": high, "smaller": low}[kind]


def _distractors(problem: Problem, answer: int) -> list[int]:
    """List near misses: off by a unit, by a ten, or the answer to another kind of question."""
    _, low, high = problem
    near = {answer + step for step in (-10, -2, -1, 1, 2, 10)} | {low, high, low + high, high - low}
    return sorted(number for number in near if number >= 0 and number != answer)


Record = dict[str, Any]

OTHERS = ("reverse", "sort", "count")


def mixed_pool(n: int, known: int, held_out: int, seed: int) -> tuple[list[Record], list[Record], list[Record]]:
    """Draw a pool, correct rows of its target, and held-out rows; no problem is in two of them.

    Args:
        n: Number of rows of the pool.
        known: Number of correct rows of the target.
        held_out: Number of held-out rows; these depend on this number and the seed alone.
        seed: The same arguments give the same rows.

    Returns:
        pool, known, held out: rows as `arithmetic_rows` has them, and rows with `prompt` and `completion`, all
        written as questions that end with "Answer:". In the pool a column `source` gives the task of a row,
        "arithmetic", "reverse", "sort" or "count"; `wrong` says whether a row of arithmetic is wrong.

    Raises:
        DataError: There are not as many different problems.

    Example:
        >>> pool, known, held_out = mixed_pool(16, known=2, held_out=2, seed=0)
        >>> sorted({row["source"] for row in pool}), len(known), len(held_out)
        (['arithmetic', 'count', 'reverse', 'sort'], 2, 2)
    """
    rng = random.Random(f"pool {seed}")
    test = arithmetic_rows(held_out, seed)
    half = n // 2
    drawn = arithmetic_rows(half + known, seed + 1, exclude=test)
    target, few = drawn[:half], drawn[half:]
    rows = [{**(_spoiled(row, rng) if place % 2 else row), SOURCE: "arithmetic"} for place, row in enumerate(target)]
    rows += [_other(OTHERS[place % len(OTHERS)], rng) for place in range(n - half)]
    rng.shuffle(rows)
    return _asked(rows), _asked(few), _asked(test)


def _asked(rows: list[Record]) -> list[Record]:
    """Write rows as questions that end with "Answer:", a form that pretrained models know."""
    questions = []
    for row in rows:
        texts: Record = {name: f" {row[name]}" for name in ("completion", "answer") if name in row}
        if "choices" in row:
            texts["choices"] = [f" {choice}" for choice in row["choices"]]
        questions.append({**row, "prompt": f"{row['prompt']}\nAnswer:", **texts})
    return questions


def _spoiled(row: Record, rng: random.Random) -> Record:
    """Replace a row's completion by another number that could be an answer."""
    wrong = rng.choice([number for number in range(199) if str(number) != row["answer"]])
    return {**row, "completion": str(wrong), "wrong": True}


def _other(kind: str, rng: random.Random) -> Record:
    """A row of another task."""
    if kind == "reverse":
        digits = str(rng.randrange(1000, 10000))
        prompt, completion = f"Write the digits of {digits} in reverse order.", digits[::-1]
    elif kind == "sort":
        numbers = rng.sample(range(10, 100), 3)
        prompt = f"Sort these numbers, the smallest first: {', '.join(map(str, numbers))}."
        completion = ", ".join(map(str, sorted(numbers)))
    else:
        first = rng.randrange(10, 990)
        prompt, completion = f"Count on: {first}, {first + 1}, {first + 2},", f"{first + 3}, {first + 4}, {first + 5}"
    return {"prompt": prompt, "completion": completion, SOURCE: kind}
