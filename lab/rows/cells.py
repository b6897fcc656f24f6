"""Cells: kind and number of the planted errors, and the rows around them.

A cell is one of `pays.cells`, with what is planted besides:

    name     KIND-PERCENT, such as near-15; with -epochs, a quarter of the rows is passed over four times
    kind     what is wrong with the planted rows, see below
    planted  their share of all rows

    uniform    two-digit arithmetic with an answer drawn evenly from 0 to 198
    near       two-digit arithmetic with a near miss for an answer
    option     questions of ARC and OpenBookQA with the text of a wrong option
    mixed      uniform among arithmetic that makes up half of the rows; texts of options are the other half
    off-task   texts of options among arithmetic
    truncated  texts of options of which the last half is missing
    duplicate  arithmetic that stands there twice: the copy is the error
    demo       the pool of `siftune demo`, of which 25 percent are wrong: its own cell, demo-25
"""

import random
from collections.abc import Sequence
from typing import Any

from lab.pays.pool import Pool
from siftune.data.target import SOURCE
from siftune.data.tasks import mixed_pool

Cell = dict[str, Any]
Row = dict[str, Any]

KINDS = ("uniform", "near", "option", "mixed", "off-task", "truncated", "duplicate", "demo")
PERCENTS = (5, 15, 30)
_TEXTS = ("option", "truncated")
_EPOCHS = 4


def cell_of(name: str) -> Cell:
    """Look up a cell.

    Raises:
        ValueError: There is none of that name.
    """
    kind, _, percent = name.removesuffix("-epochs").rpartition("-")
    if kind not in KINDS or not percent.isdecimal() or not 0 <= int(percent) < 100:
        raise ValueError(
            f"there is no cell {name!r}; use KIND-PERCENT or KIND-PERCENT-epochs, KIND: {', '.join(KINDS)}"
        )
    planted = int(percent) / 100
    wrong = planted if kind in ("uniform", "near", "option", "mixed") else 0.0
    rest = {"mixed": ["options"], "off-task": ["options"]}.get(kind, [])
    share = {"mixed": 0.5 - wrong, "off-task": 1 - planted}.get(kind, 1 - wrong)
    target = "options" if kind in _TEXTS else "arithmetic"
    plain = {"others": [], "known": 0, "longest": 28, "rows": None}
    made = {"target": target, "share": share, "wrong": wrong, "near": kind == "near", "rest": rest}
    return {"name": name, "kind": kind, "planted": planted, "epochs": name.endswith("-epochs"), **made, **plain}


def rows_in(cell: Cell, steps: int, batch: int) -> int:
    """Rows of a cell for N steps."""
    return steps * batch // (_EPOCHS if cell["epochs"] else 1)


def demo_pool(count: int, seed: int) -> Pool:
    """The demo's pool and held-out rows, as rows of `lab.pays.pool`; each says whether it is `bad`."""
    pool, known, held_out = mixed_pool(count, 100, 300, seed)

    def plain(row: Row) -> Row:
        texts = {name: row[name].strip() for name in ("completion", "answer") if name in row}
        prompt = row["prompt"].removesuffix("\nAnswer:")
        return {**row, **texts, "prompt": prompt, "group": row.get(SOURCE, "known"), "bad": row.get("wrong", False)}

    parts = [[plain(row) for row in part] for part in (pool, known, held_out)]
    return Pool(*parts, dev=parts[2][:1], other={}, text=[{"text": row["prompt"]} for row in parts[2][:1]])


def plant(rows: Sequence[Row], cell: Cell, seed: int) -> list[Row]:
    """Spoil rows where the pool has not done so; each then says whether it is `bad`.

    Args:
        rows: Rows of the pool, shuffled.
        cell: The cell.
        seed: Of the job.
    """
    rng, count = random.Random(f"planted {seed}"), round(cell["planted"] * len(rows))
    if cell["kind"] == "truncated":
        chosen = set(rng.sample(range(len(rows)), count))
        return [_cut(row) if at in chosen else {**row, "bad": False} for at, row in enumerate(rows)]
    if cell["kind"] == "duplicate":
        kept = [{**row, "bad": False} for row in rows[count:]]
        copies = [{**row, "bad": True} for row in rng.sample(kept, count)]
        return rng.sample([*kept, *copies], len(rows))
    groups = ("options",) if cell["kind"] == "off-task" else ("wrong",)
    return [{**row, "bad": row["group"] in groups} for row in rows]


def _cut(row: Row) -> Row:
    """Leave the first half of a completion, words where it has several."""
    text = row["completion"]
    words, before = text.split(), text[: len(text) - len(text.lstrip())]
    half = " ".join(words[: len(words) // 2]) if len(words) > 1 else words[0][: -(-len(words[0]) // 2)]
    return {**row, "completion": before + half, "bad": half != text.strip()}
