"""Checks of the settings of a sifting. Nothing here imports torch, so that errors come at once."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, FiniteFloat
from pydantic.dataclasses import dataclass

from siftune.base.errors import RecipeError
from siftune.base.settings import CONFIG, Chance, Count, Validated
from siftune.recipe.schema import Recipe, train_files
from siftune.sifting.choose import NO_LIMITS, Limits

STEPS = 60  # of the training on the pool, at most (ours: docs/sifting.md)
RECORD = "sift.json"  # in the folder of a sifted pool

PoolShare = Count | Chance  # a number of rows, or a share of the pool
Similarity = Annotated[float, Field(ge=-1, le=1)]


@dataclass(kw_only=True, config=CONFIG)
class _Ranges(Validated):
    """Ranges of what selects rows, for the command line and callers alike."""

    share: PoolShare | None
    max_score: FiniteFloat | None
    min_similarity: Similarity | None


def check_sifting(
    recipe: Recipe, share: float | int | None = None, avoid: str | None = None, limits: Limits = NO_LIMITS
) -> None:
    """Refuse settings by which a pool cannot be sifted, before its rows are read.

    Raises:
        RecipeError: With one sentence on the first.
    """
    _Ranges(share=share, max_score=limits.score, min_similarity=limits.similarity)
    names = [*train_files(recipe), *filter(None, (recipe.target, avoid))]
    files = [Path(name).expanduser().resolve() if Path(name).expanduser().exists() else name for name in names]
    twice = next((name for place, name in enumerate(names) if files[place] in files[:place]), "")
    faults = (
        (not recipe.train, "there is no pool to sift: give --train FILE"),
        (
            recipe.dp_epsilon is not None,
            "sifting chooses rows by their losses, which no noise covers: leave out sift, avoid or dp_epsilon",
        ),
        (
            not recipe.target and not avoid,
            "a pool is sifted by a few correct rows of the task, or by bad ones: give --target FILE or --avoid FILE",
        ),
        (bool(twice), f"{twice} is named twice, in the pool, as the target or as bad rows: name each file once"),
        (recipe.drop_rows is not None, "sifting and drop_rows both say which rows are left out: give one of them"),
        (
            recipe.sharding != "none",
            "sifting computes losses with the complete model in each process: leave out sift, avoid or sharding",
        ),
        (
            share is not None and not recipe.target,
            "share is that of the rows most like the target: give --target FILE, or leave share out",
        ),
        (
            limits != NO_LIMITS and not recipe.target,
            "max_score and min_similarity compare rows with the target: give --target FILE, or leave them out",
        ),
        (
            limits != NO_LIMITS and share is not None,
            "share selects a number of rows, and max_score and min_similarity all rows within limits: leave out "
            "share, or the limits",
        ),
    )
    for is_wrong, sentence in faults:
        if is_wrong:
            raise RecipeError(sentence)
