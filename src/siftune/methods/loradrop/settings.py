"""Settings of LoRA-drop."""

from dataclasses import dataclass
from typing import Annotated

from siftune.base.settings import COUNT, COUNT_OR_SHARE, OURS, SHARE, Settings


@dataclass
class LoRADropSettings(Settings):
    """The layers train whose adapters respond most, after some steps in which all do."""

    group = "loradrop"

    threshold: Annotated[float, SHARE] = 0.9
    """Layers are taken by their importance, the highest first, until they have this share of all of it."""
    active: Annotated[int | float | None, COUNT_OR_SHARE, OURS] = None
    """Layers that are taken in the place of that: a whole number of them, or a share such as 0.25."""
    select_after: Annotated[int, COUNT, OURS] = 20
    """Optimizer steps at the start in which all layers train, before which adapters respond with zero."""
    score_rows: Annotated[int, COUNT, OURS] = 16
    """Training rows that responses are measured on."""
