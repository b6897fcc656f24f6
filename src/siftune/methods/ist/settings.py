"""Settings of IST; defaults are the paper's."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from siftune.base.settings import BELOW_ONE, COUNT, OURS, POSITIVE, SHARE, Range, Settings

Source = Literal["response", "gradients"]
_SCORING = ("interval", "score_batch_size", "candidates", "suppressed", "factor", "score_lr")


@dataclass
class ISTSettings(Settings):
    """Importance-aware sparse tuning: layers drawn by their importance in every step."""

    group = "ist"

    active: Annotated[float, SHARE] = 0.25
    """Share of the layers that train in a step."""
    importance_from: Annotated[Source, OURS] = "response"
    """The loss with some layers' response damped (the paper's), or the norms of layers' gradients, which are free."""
    interval: Annotated[int | None, COUNT] = 10
    """Optimizer steps between two updates of the importance; None (in YAML null) never updates it."""
    score_batch_size: Annotated[int, COUNT] = 16
    """Training rows on which an update measures the loss."""
    candidates: Annotated[int, Range(lambda v: v >= 2, "2 or more: a candidate is rewarded relative to the others")] = 3
    """Sets of layers that an update compares."""
    suppressed: Annotated[float, Range(lambda v: 0 < v < 1, "above 0 and below 1")] = 0.5
    """Share of the layers in each of these sets."""
    factor: Annotated[float, BELOW_ONE] = 0.25
    """What the adapter response of a suppressed layer is multiplied by."""
    score_lr: Annotated[float, POSITIVE] = 10.0
    """Learning rate of the importance."""

    def _faults(self) -> Iterable[tuple[bool, str]]:
        for name in _SCORING:
            value = getattr(self, name)
            yield (
                self.scores_nothing and value != getattr(ISTSettings, name),
                f"ist.{name} is {value}, which has no effect with ist.importance_from gradients: leave it out",
            )

    @property
    def scores_nothing(self) -> bool:
        """Whether no pass is made to compare layers."""
        return self.importance_from == "gradients"
