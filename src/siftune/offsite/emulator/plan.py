"""Plan an emulator's middle: which layers it has, and how much of each stays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from siftune.base.errors import RecipeError, UnsupportedError
from siftune.base.files import Progress
from siftune.offsite.emulator.compress import Compression
from siftune.offsite.emulator.costs import SHARES, measured_shares
from siftune.offsite.emulator.recording import Recording
from siftune.offsite.emulator.split import Split
from siftune.offsite.maths.baselines import crash_sources, neighbour_similarities, uniform_layers

Allotment = Literal["uniform", "measured"]


@dataclass(frozen=True)
class EmulatorSettings(Compression):
    """How a model's middle is compressed.

    Attributes:
        split: Outer layers at either end.
        allot: `uniform`: all matrices keep the same share. `measured` *(ours, gradot)*: each as much as pays by its
            measured cost.

    Example:
        >>> EmulatorSettings(keep=0.5, split=Split(first=1, last=1)).keep
        0.5
    """

    split: Split = field(default_factory=Split)
    allot: Allotment = "uniform"

    @property
    def downwards(self) -> bool:
        """Whether layers may be compressed from the last to the first: neither plan nor layers need those below."""
        return self.allot == "uniform"

    def check(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: With one sentence on the first value that cannot be used.
        """
        if not 0 < self.keep <= 1:
            raise RecipeError(f"keep is {self.keep}, but must be above 0 and at most 1")
        for name in ("lambda_attn", "lambda_mlp"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RecipeError(f"{name} is {getattr(self, name)}, but must be a finite number of 0 or more")
        if not 0 <= self.protect <= 1:
            raise RecipeError(f"protect is {self.protect}, but must be from 0 to 1")
        for name in ("damping", "refit_damping"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{name} is {getattr(self, name)}, but must be above 0")
        whole_layers = self.method in ("layerdrop", "crash")
        if whole_layers and (self.allot != "uniform" or self.lambda_attn or self.lambda_mlp):
            raise RecipeError(f"method {self.method} drops whole layers: it has no λ, and nothing to allot")
        if self.allot == "measured":
            self._check_measured()

    def _check_measured(self) -> None:
        if self.method != "gradot":
            raise RecipeError(f"allot measured is for method gradot, but method is {self.method}: use allot uniform")
        if self.keep < SHARES[0]:
            raise RecipeError(f"keep is {self.keep}, but allot measured leaves {SHARES[0]} of every matrix or more")


@dataclass(frozen=True)
class Step:
    """One layer of an emulator's middle."""

    number: int  # number of the base's layer that it comes from
    keep: float = 1.0  # fraction of its matrices' parameters that stays
    same_as: int | None = None  # place in the middle of the layer whose weights it has; None for its own
    # fractions by path of the matrix, in place of one for all; see `Compression`
    shares: Mapping[str, float] | None = None


def plan(
    model: nn.Module, recording: Recording, settings: EmulatorSettings, progress: Progress | None = None
) -> list[Step]:
    """Plan the middle, of a model and what its layers saw, by checked settings.

    Raises:
        UnsupportedError: Layers are to be dropped in a model whose layers depend on their number.
    """
    numbers = recording.numbers
    count = max(1, round(settings.keep * len(numbers)))
    if settings.method in ("layerdrop", "crash"):
        _refuse_numbered(getattr(model, "config", None), settings.method)
    if settings.method == "layerdrop":
        return [Step(numbers[place]) for place in uniform_layers(len(numbers), count)]
    if settings.method == "crash":
        sources = crash_sources(neighbour_similarities(recording.outputs(number) for number in numbers), count)
        return [Step(numbers[s], same_as=None if s == place else s) for place, s in enumerate(sources)]
    if settings.allot == "measured" and settings.keep < 1:
        measured = measured_shares(model, recording, settings, progress)
        return [Step(number, settings.keep, shares=measured[number]) for number in numbers]
    return [Step(number, settings.keep) for number in numbers]


def _refuse_numbered(config: Any, method: str) -> None:
    """GPT-2 can scale attention by the layer's number, which dropping layers would change."""
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UnsupportedError(
            f"method {method} drops layers, but this model scales attention by the number of the layer "
            "(scale_attn_by_inverse_layer_idx); use method gradot"
        )
