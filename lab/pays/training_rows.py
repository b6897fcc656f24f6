"""Training rows of a method: the pool, the known rows, or parts of both.

A plan is a name, then what is added to it, with plus signs between:

    pool        every row of the pool
    known       the known rows alone, repeated so that they fill the steps
    retrieved   the quarter of the pool most similar to the known rows: see `siftune.sifting.similarity`
    sifted      a share of the pool, by its loss under a model tuned on the known rows: see `lab.pays.sifting`
    less        a quarter of the pool, by its gradients under such a model: see `lab.pays.gradients`

    +known      the known rows, each once
    +weighted   the known rows, repeated so that they are a quarter of all rows
    +capped     the same, but none more than 30 times, as `siftune train --target` has it

Repeated rows come equally often, but for one. Where there are more rows than the steps take, the Trainer's shuffle
decides which of them are left out.
"""

from collections.abc import Callable, Sequence
from typing import Any

from siftune.base.errors import RecipeError

Record = dict[str, Any]

KNOWN_SHARE = 0.25  # of all rows, for "+weighted"
MOST = 30  # times that a row comes, for "+capped"
_ADDITIONS = ("known", "weighted", "capped")
_BASES = ("pool", "known", "retrieved", "sifted", "less")


def training_rows(
    plan: str,
    pool: Sequence[Record],
    known: Sequence[Record],
    count: int,
    choose: Callable[[str], Sequence[Record]] | None = None,
) -> list[Record]:
    """Put together the rows of a plan.

    Args:
        plan: As above.
        pool: Rows of the pool.
        known: Known rows of the target.
        count: Rows that the steps take.
        choose: Chooses the rows of the plans "retrieved", "sifted" and "less", by their name.

    Raises:
        RecipeError: No such plan, or known rows are needed and there are none.
    """
    base, *additions = plan.split("+")
    if base not in _BASES or any(addition not in _ADDITIONS for addition in additions):
        raise RecipeError(f"unknown rows {plan!r}; use {', '.join(_BASES)}, and +{', +'.join(_ADDITIONS)} after them")
    if not known and (additions or base != "pool"):
        raise RecipeError(f"rows {plan!r} need known rows of the target, but the cell has none; give known rows")
    rows = _base(base, pool, known, count, choose)
    if "known" in additions:
        rows = [*rows, *known]
    fair = round(len(rows) * KNOWN_SHARE / (1 - KNOWN_SHARE))
    if "weighted" in additions:
        rows = [*rows, *repeated(known, fair)]
    if "capped" in additions:
        rows = [*rows, *repeated(known, min(fair, MOST * len(known)))]
    return rows


def _base(
    name: str,
    pool: Sequence[Record],
    known: Sequence[Record],
    count: int,
    choose: Callable[[str], Sequence[Record]] | None,
) -> list[Record]:
    if name == "pool":
        return list(pool)
    if name == "known":
        return repeated(known, count)
    assert choose is not None
    return list(choose(name))


def repeated(rows: Sequence[Record], count: int) -> list[Record]:
    """Go through the rows again and again until there are `count`."""
    return [rows[place % len(rows)] for place in range(count)]
