"""The numbers of a private run: what was asked for, and what follows."""

import math
from dataclasses import dataclass
from typing import Literal

Clipping = Literal["layer", "flat"]


@dataclass(frozen=True)
class Mechanism:
    """A subsampled Gaussian mechanism, composed over steps."""

    epsilon: float  # the largest ε of the whole run
    delta: float
    clip: float  # C, the largest norm of what one row adds to a step
    # "layer": each layer that trains in a step has C / √(number of these); "flat": C for all together
    clipping: Clipping
    rows: int  # n, rows to train on
    batch: int  # b, rows of a step on average
    steps: int  # optimizer steps of the whole run
    noise: float = 0.0  # σ, the noise's standard deviation in units of C; 0 until it is found

    @property
    def rate(self) -> float:
        """Q: the chance with which each row is drawn for a step."""
        return self.batch / self.rows

    def threshold(self, layers: int) -> float:
        """Largest norm of what one row adds to that which is clipped together, in a step where so many layers train."""
        return self.clip if self.clipping == "flat" else self.clip / math.sqrt(layers)
