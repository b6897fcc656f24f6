"""Options of the methods, one class per method. No import of torch, so that `siftune --help` stays fast."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from siftune.base.settings import CONFIG, AtLeastTwo, Count, CountOrShare, Settings, Share

OWN = "own"  # for texts that the base model writes itself
KEEP_WEIGHT = 1.0  # of the penalty against forgetting


def count_of(select: int | float, total: int) -> int:
    """Number of items to take from `total`: the count, at most all, or max(1, ⌊share · total⌋) without rounding errors.

    Example:
        >>> count_of(8, 16), count_of(0.25, 30), count_of(8, 4)
        (8, 7, 4)
    """
    count = select if isinstance(select, int) else max(1, math.floor(select * total + 1e-9))
    return min(count, total)


def selects_all(settings: Any, samples: int) -> bool:
    """Whether a method that selects rows follows every row of a batch without being asked to by a share of 1.0."""
    explicit = isinstance(settings.select, float) and settings.select == 1.0
    return not explicit and count_of(settings.select, samples) == samples


@dataclass(config=CONFIG)
class RSTSettings(Settings):
    """Random sparse tuning: layers drawn at random in every step."""

    group = "rst"

    active: Share = 0.25
    """Share of the layers that train in a step."""


@dataclass(config=CONFIG)
class ISTSettings(Settings):
    """Importance-aware sparse tuning: layers drawn by their importance in every step."""

    group = "ist"

    active: Share = 0.25
    """Share of the layers that train in a step."""
    interval: Count = 10
    """Optimizer steps between two updates of the importance."""
    score_batch_size: Count = 16
    """Training rows used to measure the loss in an update."""
    candidates: AtLeastTwo = 3
    """Sets of half the layers compared in an update."""


@dataclass(config=CONFIG)
class GASTSettings(Settings):
    """Gradient-aligned sparse tuning: every layer follows the rows whose gradients align with a support set."""

    group = "gast"

    # ours: the paper draws support rows from the training set; with a target these are few, clean and of the task
    with_target: ClassVar[Mapping[str, Any]] = {
        "select": 0.5, "support": "dataset", "support_size": 8, "choice": "topk", "score": "cosine",
    }  # fmt: skip

    select: CountOrShare = 0.75  # ours
    """Rows of a batch that a layer follows: a number of rows, or a share such as 0.75 (the paper's: 0.5)."""
    support: Literal["sample", "rest", "dataset"] = "sample"
    """Rows to compare with: drawn training rows (the paper's), the other rows of the batch, or the rows of a target."""
    support_size: Count = 4
    """Support rows per step, for support sample and dataset."""
    support_every: Count = 1  # ours
    """Optimizer steps between two support gradients, for support sample and dataset; above 1 a running mean of them is
    used."""
    choice: Literal["stochastic", "topk", "random"] = "stochastic"
    """Draw rows by their score (the paper's), take those with the highest scores, or draw uniformly."""
    score: Literal["inner", "cosine"] = "inner"
    """Inner product of the gradients (the paper's), or their cosine."""

    def _faults(self) -> Any:
        yield (
            self.support_every > 1 and not self.needs_rows,
            "gast.support_every applies to gast.support sample and dataset only: leave it out",
        )
        defaults = (type(self).support_size, self.with_target["support_size"])
        yield (
            self.support == "rest" and self.support_size not in defaults,
            "gast.support_size applies to gast.support sample and dataset only: leave it out",
        )

    @property
    def needs_scores(self) -> bool:
        """Whether the choice depends on the samples."""
        return self.choice != "random"

    @property
    def needs_rows(self) -> bool:
        """Whether the support gradient takes rows of its own."""
        return self.needs_scores and self.support in ("sample", "dataset")
