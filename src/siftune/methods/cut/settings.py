"""Settings of Cut."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from siftune.base.settings import OURS, Settings


@dataclass
class CutSettings(Settings):
    """All layers above a random depth train, so that backward ends there."""

    group = "cut"

    depths: Annotated[tuple[float, ...], OURS] = (0.0, 0.25, 0.5, 0.75)
    """Shares of the layers that lie below the cut, one drawn at a time, evenly; a share given twice counts twice."""

    def _faults(self) -> Iterable[tuple[bool, str]]:
        yield not self.depths, "cut.depths is empty: give at least one share, such as 0"
        for depth in self.depths:
            yield not 0 <= depth < 1, f"cut.depths holds {depth}, but each must be from 0 to below 1"
