"""A seeded pool in which the task that counts is the smaller part, as pools scraped together are.

The demo trains on it: a quarter are right rows of arithmetic, a quarter rows of arithmetic with a wrong answer, and the
rest other tasks: turning digits around, sorting, counting on.
"""

from __future__ import annotations

import random
from typing import Any

from siftune.data.arithmetic import arithmetic_rows
from siftune.data.target import SOURCE

Record = dict[str, Any]

OTHERS = ("reverse", "sort", "count")


def mixed_pool(n: int, known: int, held_out: int, seed: int) -> tuple[list[Record], list[Record], list[Record]]:
    """Draw a pool, rows of its target that are known to be right, and held-out ones; no problem comes in two of them.

    Args:
        n: Rows of the pool.
        known: Known rows.
        held_out: Held-out rows; they depend on this number and the seed alone.
        seed: The same arguments give the same rows.

    Returns:
        pool, known, held out: rows as `arithmetic_rows` has them, and rows with `prompt` and `completion`, all written
        as questions that end with "Answer:". In the pool a column `source` says what a row is: "arithmetic", "wrong",
        "reverse", "sort" or "count".

    Raises:
        DataError: There are not as many different problems.

    Example:
        >>> pool, known, held_out = mixed_pool(16, known=2, held_out=2, seed=0)
        >>> sorted({row["source"] for row in pool}), len(known), len(held_out)
        (['arithmetic', 'count', 'reverse', 'sort', 'wrong'], 2, 2)
    """
    rng = random.Random(f"pool {seed}")
    test = arithmetic_rows(held_out, seed)
    half = n // 2
    drawn = arithmetic_rows(half + known, seed + 1, exclude=test)
    target, few = drawn[:half], drawn[half:]
    rows = [_spoiled(row, rng) if place % 2 else {**row, SOURCE: "arithmetic"} for place, row in enumerate(target)]
    rows += [_other(OTHERS[place % len(OTHERS)], rng) for place in range(n - half)]
    rng.shuffle(rows)
    return _asked(rows), _asked(few), _asked(test)


def _asked(rows: list[Record]) -> list[Record]:
    """Write rows as questions that wait for their answer: pretrained models know that form."""
    asked = []
    for row in rows:
        texts: Record = {name: f" {row[name]}" for name in ("completion", "answer") if name in row}
        if "choices" in row:
            texts["choices"] = [f" {choice}" for choice in row["choices"]]
        asked.append({**row, "prompt": f"{row['prompt']}\nAnswer:", **texts})
    return asked


def _spoiled(row: Record, rng: random.Random) -> Record:
    """Give a row any other number that an answer could be."""
    wrong = rng.choice([number for number in range(199) if str(number) != row["answer"]])
    return {**row, "completion": str(wrong), "wrong": True, SOURCE: "wrong"}


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
