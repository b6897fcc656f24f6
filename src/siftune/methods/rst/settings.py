"""Settings of RST."""

from dataclasses import dataclass
from typing import Annotated

from siftune.base.settings import SHARE, Settings


@dataclass
class RSTSettings(Settings):
    """Random sparse tuning: layers drawn at random in every step."""

    group = "rst"

    active: Annotated[float, SHARE] = 0.25
    """Share of the layers that train in a step; lisa holds a draw for several, with keep_state as here."""
