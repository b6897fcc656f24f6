"""Settings of GREATS."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from siftune.base.settings import COUNT, COUNT_OR_SHARE, OURS, Settings


@dataclass
class GREATSSettings(Settings):
    """GREATS: all layers follow the rows that most help a support set."""

    group = "greats"

    with_target: ClassVar[Mapping[str, Any]] = {"support": "dataset"}

    select: Annotated[int | float, COUNT_OR_SHARE] = 0.5
    """Rows of a batch that are followed: a whole number of rows, or a share such as 0.5."""
    support: Annotated[Literal["sample", "dataset"], OURS] = "sample"
    """What rows are to help: drawn training rows, or a target's (the paper's: rows that are held out)."""
    support_size: Annotated[int, COUNT, OURS] = 4
    """Rows in the support set of a step."""

    @property
    def needs_scores(self) -> bool:
        """Whether the choice depends on the samples."""
        return True

    @property
    def needs_rows(self) -> bool:
        """Whether the support gradient takes rows of its own."""
        return True
