"""Checks of the settings of a sifting. Nothing here imports torch, so that errors come at once."""

import math
from pathlib import Path

from siftune.base.errors import RecipeError
from siftune.recipe.schema import Recipe, train_files
from siftune.sifting.choose import NO_LIMITS, Limits

STEPS = 60  # of the training on the pool, at most (ours: docs/sifting.md)
RECORD = "sift.json"  # in the folder of a sifted pool


def check_sifting(
    recipe: Recipe, share: float | int | None = None, avoid: str | None = None, limits: Limits = NO_LIMITS
) -> None:
    """Refuse settings by which a pool cannot be sifted, before its rows are read.

    Raises:
        RecipeError: With one sentence on the first.
    """
    # of YAML, the command line and callers alike: True is no number here
    number = (type(share) is int and share >= 1) or (type(share) is float and 0 < share < 1)
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
            share is not None and not number,
            f"share is {share!r}, but must be a share of the pool, above 0 and below 1, or a number of rows",
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
        (
            not _is_number(limits.score, -math.inf, math.inf),
            f"max_score is {limits.score!r}, but must be a score as in scores.csv",
        ),
        (
            not _is_number(limits.similarity, -1, 1),
            f"min_similarity is {limits.similarity!r}, but must be from -1 to 1",
        ),
    )
    for is_wrong, sentence in faults:
        if is_wrong:
            raise RecipeError(sentence)


def _is_number(value: float | None, least: float, most: float) -> bool:
    """Whether a limit is missing, or a finite number in a range."""
    if value is None:
        return True
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and least <= value <= most
