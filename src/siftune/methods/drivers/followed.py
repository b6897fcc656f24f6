"""How many rows of a batch are followed, and what to say where that is all of them. Nothing here imports torch."""

import math
from typing import Any


def how_many(select: int | float, samples: int) -> int:
    """K for a batch: the count, or max(1, ⌊share·B⌋); never more than B."""
    count = select if isinstance(select, int) else max(1, math.floor(select * samples + 1e-9))
    return min(count, samples)


def chooses_nothing(settings: Any, samples: int) -> bool:
    """Whether a method that chooses rows follows all rows of a forward pass; a share of 1.0 says that it is to."""
    meant = isinstance(settings.select, float) and settings.select == 1.0
    by_batch = getattr(settings, "among", "batch") == "batch"
    return by_batch and not meant and how_many(settings.select, samples) == samples


def can_look_back(settings: Any) -> bool:
    """Whether `among: recent` would go with a method's other settings, so that rows are chosen in any batch."""
    if not hasattr(settings, "among") or isinstance(settings.select, int):
        return False
    return not settings.needs_scores or settings.support in ("sample", "dataset", "momentum")
