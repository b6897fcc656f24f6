"""A seeded task with checkable answers: arithmetic and comparison of two-digit numbers.

The demo and the benchmarks use it, because it needs no download, every answer can be checked, and a share of
wrong labels can be planted whose rows are known. Four kinds of question, equally often: the sum, the
difference, the larger and the smaller of two different numbers from 10 to 99.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from siftune.base.errors import DataError

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


def arithmetic_rows(
    n: int, seed: int, noise: float = 0.0, exclude: Iterable[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Draw `n` different questions with their answers.

    Args:
        n: number of rows; the four kinds differ in number by at most one.
        seed: the same arguments give the same rows.
        noise: share of the rows, 0 to 1, whose completion is a wrong number: exactly `round(noise * n)` rows.
        exclude: rows whose problems must not come again, whatever the wording or the order of the numbers.

    Returns:
        Rows with `prompt`, `completion` (a number as a string, wrong where `wrong` is True), `answer` (always
        right), `choices` (4 different strings, the answer among them), `kind`, `a`, `b` and `wrong`.

    Raises:
        DataError: there are fewer different problems left than `n`, or `noise` is not a share.
    """
    if not 0 <= noise <= 1:
        raise DataError(f"noise is {noise}, but it is a share of the rows; give a number from 0 to 1.")
    rng = random.Random(seed)
    seen = {_problem(row) for row in exclude or ()}
    problems = [problem for i, kind in enumerate(KINDS) for problem in _draw(rng, kind, _share(n, i), seen)]
    rng.shuffle(problems)
    wrong = set(rng.sample(range(n), round(noise * n)))
    return [_row(rng, problem, i in wrong) for i, problem in enumerate(problems)]


def split(
    n_train: int, n_test: int, seed: int, noise: float = 0.0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw training and held-out rows that share no problem; only the training rows carry `noise`.

    The held-out rows depend on `n_test` and `seed` alone, so runs with different training sets compare.

    Raises:
        DataError: as `arithmetic_rows`.
    """
    test = arithmetic_rows(n_test, seed)
    return arithmetic_rows(n_train, seed + 1, noise, exclude=test), test


def _problem(row: dict[str, Any]) -> Problem:
    """Identify the problem of a row, whatever its wording and the order of its numbers."""
    return row["kind"], min(row["a"], row["b"]), max(row["a"], row["b"])


def _share(n: int, index: int) -> int:
    """How many of `n` rows the kind number `index` gets."""
    return (n + len(KINDS) - 1 - index) // len(KINDS)


def _draw(rng: random.Random, kind: str, count: int, seen: set[Problem]) -> list[Problem]:
    """Draw `count` different problems of one kind that were not seen."""
    pool = [(kind, low, high) for low, high in _PAIRS if (kind, low, high) not in seen]
    if count > len(pool):
        raise DataError(
            f"{count} arithmetic rows of the kind {kind!r} were asked for, but only {len(pool)} different "
            f"problems are left; ask for at most {len(pool) * len(KINDS)} rows in all."
        )
    return rng.sample(pool, count)


def _row(rng: random.Random, problem: Problem, wrong: bool) -> dict[str, Any]:
    """Word one problem, with its choices and its (possibly wrong) completion."""
    kind, low, high = problem
    a, b = rng.sample((low, high), 2)
    answer = _answer(problem)
    others = rng.sample(_distractors(problem, answer), 3)
    choices = [str(choice) for choice in rng.sample([answer, *others], 4)]
    return {
        "prompt": rng.choice(_WORDINGS[kind]).format(a=a, b=b, low=low, high=high),
        "completion": str(others[0] if wrong else answer),
        "answer": str(answer),
        "choices": choices,
        "kind": kind,
        "a": a,
        "b": b,
        "wrong": wrong,
    }


def _answer(problem: Problem) -> int:
    kind, low, high = problem
    return {"sum": low + high, "difference": high - low, "larger": high, "smaller": low}[kind]


def _distractors(problem: Problem, answer: int) -> list[int]:
    """List near misses: off by a unit, by a ten, or the answer to another kind of question."""
    _, low, high = problem
    near = {answer + step for step in (-10, -2, -1, 1, 2, 10)} | {low, high, low + high, high - low}
    return sorted(number for number in near if number >= 0 and number != answer)
