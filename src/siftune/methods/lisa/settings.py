"""Settings of LISA."""

from dataclasses import dataclass
from typing import Annotated

from siftune.base.settings import COUNT, COUNT_OR_SHARE, OURS, Settings


@dataclass
class LISASettings(Settings):
    """Layerwise importance sampled AdamW: a few layers drawn at random, held for some steps."""

    group = "lisa"

    active: Annotated[int | float, COUNT_OR_SHARE] = 2
    """Layers that train: a whole number of them, or a share such as 0.25."""
    interval: Annotated[int, COUNT] = 20
    """Optimizer steps for which a draw is held."""
    keep_state: Annotated[bool, OURS] = False
    """Keep the optimizer's state of layers that leave; else it is dropped, which frees its memory."""
