"""Settings of LISA."""

from dataclasses import dataclass
from typing import Annotated, Literal

from siftune.settings import COUNT, COUNT_OR_SHARE, NOT_NEGATIVE, OURS, Settings

Pattern = Literal["scattered", "window", "upper"]


@dataclass
class LISASettings(Settings):
    """Layerwise importance sampled AdamW: a few layers drawn at random, held for some steps."""

    group = "lisa"

    active: Annotated[int | float, COUNT_OR_SHARE] = 2
    """Layers that train: a whole number of them, or a share such as 0.25."""
    interval: Annotated[int, COUNT] = 20
    """Optimizer steps for which a draw is held."""
    pattern: Annotated[Pattern, OURS] = "scattered"
    """Layers anywhere (the paper's), a window of neighbours anywhere, or one within the upper half of the layers."""
    in_turn: Annotated[bool, OURS] = False
    """Every layer has its turn before one comes again; windows then lie side by side."""
    select_after: Annotated[int, NOT_NEGATIVE, OURS] = 0
    """Optimizer steps at the start in which all layers train, before layers are drawn."""
    keep_state: Annotated[bool, OURS] = False
    """Keep the optimizer's state of layers that leave; else it is dropped, which frees its memory."""
