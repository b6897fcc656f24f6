"""Settings of the static choice."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from siftune.base.settings import OURS, Settings


@dataclass
class StaticSettings(Settings):
    """The same layers train in every step."""

    group = "static"

    numbers: Annotated[tuple[int, ...], OURS] = (-1,)
    """Numbers of the layers that train, from 0, negative from the end: any set, such as a window in the middle."""

    def _faults(self) -> Iterable[tuple[bool, str]]:
        yield not self.numbers, "static.numbers is empty: give the number of at least one layer"
