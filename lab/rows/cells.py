"""Pools whose wrong rows are known.

    NAME           a pool of `pays.natural`, such as intents-a: errors of people, programs and models
    mixed-PERCENT  two-digit sums, words spelled backwards and sequences in one file; every N-th sum has a random number
    KIND-PERCENT   arithmetic, of which a share has a wrong answer: KIND is uniform (0 to 198) or near (a near miss)

Rows have `prompt` and `completion`, as a file of training rows has them, and say whether they are `bad`.
"""

import random
from pathlib import Path
from typing import Any

from lab.pays.cells import cells_of
from lab.pays.natural import natural_cells, natural_pool
from lab.pays.pool import asked, make_pool
from siftune.base.errors import DataError

Row = dict[str, Any]
Job = dict[str, Any]

_ARITHMETIC = ("uniform", "near")


def rows_of(job: Job, data: Path) -> tuple[list[Row], list[Row]]:
    """Draw the rows of a job, and correct rows of the same task.

    Args:
        job: The job; of it count `cell` and `seed`.
        data: Folder of the commonsense suite and of natural data.

    Raises:
        DataError: There is no such cell, or it has too few rows.
    """
    cell, seed = job["cell"], job["seed"]
    kind, _, percent = cell["name"].rpartition("-")
    if cell["name"] in {each["name"] for each in natural_cells(0)}:
        pool = natural_pool(job, data)
    elif kind == "mixed":
        return mixed_rows(cell["rows"], int(percent), seed), []
    elif kind in _ARITHMETIC:
        wrong = int(percent) / 100
        planted = {"near": kind == "near", "wrong": wrong, "share": 1 - wrong, "others": []}
        pool = make_pool(
            {**job, "cell": {**cells_of("S2", ["uniform-15"], 0)[0], **planted, **cell}}, data, lambda _: 0
        )
    else:
        raise DataError(f"there is no cell {cell['name']!r}; use a natural pool, or mixed-, uniform- or near-PERCENT")
    return [{**asked(row), "bad": row["group"] == "wrong"} for row in pool.train], [asked(row) for row in pool.known]


def mixed_rows(count: int, percent: int, seed: int) -> list[Row]:
    """Rows of three tasks, in the ratio of 20 to 13 to 13; a share of the sums is wrong.

    Example:
        >>> rows = mixed_rows(460, 25, seed=0)
        >>> sum(row["bad"] for row in rows), len({row["prompt"] for row in rows})
        (50, 460)
    """
    rng = random.Random(f"mixed {seed}")
    sums = rng.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], round(count * 20 / 46))
    others = (count - len(sums)) // 2
    words: set[str] = set()
    while len(words) < count - len(sums) - others:
        words.add("".join(rng.choice("aeioubcdfghlmnprst") for _ in range(rng.randrange(3, 7))))
    starts = rng.sample([(start, step) for start in range(500) for step in (1, 2, 5, 10)], others)
    rows = [
        {"prompt": f"Spell backwards: {word}", "completion": f" {word[::-1]}", "bad": False} for word in sorted(words)
    ]
    for start, step in starts:
        *shown, last = (start + step * place for place in range(5))
        rows.append({"prompt": f"Continue: {', '.join(map(str, shown))}", "completion": f" {last}", "bad": False})
    wrong = round(len(sums) * percent / 100)
    for place, (a, b) in enumerate(sums):
        number = rng.choice([n for n in range(199) if n != a + b]) if place < wrong else a + b
        rows.append({"prompt": f"What is {a} plus {b}?", "completion": f" {number}", "bad": place < wrong})
    rng.shuffle(rows)
    return rows
