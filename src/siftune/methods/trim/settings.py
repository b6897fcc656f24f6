"""Settings of Trim."""

from dataclasses import dataclass
from typing import Annotated, Literal

from siftune.base.settings import COUNT_OR_SHARE, OURS, Settings

Which = Literal["small", "large", "random"]


@dataclass
class TrimSettings(Settings):
    """All layers follow the rows of a batch with the smallest loss."""

    group = "trim"

    select: Annotated[int | float, COUNT_OR_SHARE, OURS] = 0.75
    """Rows of a batch that are followed: a whole number of rows, or a share such as 0.75."""
    which: Which = "small"
    """Follow the rows of the smallest mean token loss; of the largest, so that what is learned already is left out; or
    as many at random, which looks at no loss."""

    @property
    def needs_scores(self) -> bool:
        """Whether the choice depends on the samples."""
        return self.which != "random"
