"""What sample selection chose: its units, and the choice in one batch."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from siftune.engine.groups import LayerGroup
from siftune.engine.substitution import units
from siftune.methods.gast.maths import Pool


@dataclass(frozen=True, eq=False)
class Unit:
    """What chooses samples together: a layer, or an adapted module.

    Attributes:
        place: Its number among the units of the model.
        layer: Number of its layer.
        name: Full name of the layer or module.
        parameters: Its trainable parameters.
    """

    place: int
    layer: int
    name: str
    parameters: tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class Samples:
    """The choice in one batch.

    Attributes:
        step: Optimizer steps done before it.
        batch: Number of the batch within the step, over all ranks.
        units: (U,) names of the layers, or of the modules with `pool="module"`, from the embeddings.
        layers: (U,) numbers of the layers.
        scores: (U, S) scores, float32, or float64 where the gradients are; NaN where none were needed: all samples
            are followed, or a random choice.
        selected: (U, K) int64 numbers of the samples in the batch, ascending.
    """

    step: int
    batch: int
    units: tuple[str, ...]
    layers: tuple[int, ...]
    scores: Tensor
    selected: Tensor

    def record(self, scores: bool = False) -> dict[str, Any]:
        """JSON-ready form, for a run's selection records; scores with four digits, null where they are not finite."""
        record: dict[str, Any] = {"step": self.step, "batch": self.batch, "layers": list(self.layers)}
        record["selected"] = self.selected.tolist()
        if scores:
            record["scores"] = [[_short(score) for score in row] for row in self.scores.tolist()]
        return record


def _short(score: float) -> float | None:
    return float(f"{score:.4g}") if math.isfinite(score) else None


class Choosing:
    """One batch while the choice goes on: counts, uniform numbers, and the choices so far.

    Args:
        step: Optimizer steps done before it.
        number: Number of the batch within the step, over all ranks.
        samples: Samples S in it.
        count: Samples K to choose.
        uniform: (U, S) float64 uniform numbers, one row per unit of the model.
    """

    def __init__(self, step: int, number: int, samples: int, count: int, uniform: Tensor) -> None:
        self.samples = samples
        self.count = count
        self._uniform = uniform
        self._step = step
        self._number = number
        self._choices: dict[Unit, tuple[Tensor, Tensor]] = {}

    def uniform_on(self, device: torch.device) -> Tensor:
        """The uniform numbers on a device, brought there once; (U, S) float64, or float32 where it has no other."""
        if self._uniform.device != device:
            self._uniform = self._uniform.to(device, torch.float32 if device.type == "mps" else torch.float64)
        return self._uniform

    def note(self, unit: Unit, scores_S: Tensor | None, chosen_K: Tensor) -> None:
        """Keep a unit's choice; None where it needed no scores."""
        missing = torch.full((self.samples,), torch.nan)
        self._choices[unit] = (missing if scores_S is None else scores_S, chosen_K)

    def done(self) -> Samples | None:
        """The choices so far, from the embeddings; None before the first."""
        chosen = sorted(self._choices, key=lambda unit: unit.place)
        if not chosen:
            return None
        return Samples(
            self._step,
            self._number,
            tuple(unit.name for unit in chosen),
            tuple(unit.layer for unit in chosen),
            torch.stack([self._choices[unit][0].cpu() for unit in chosen]),
            torch.stack([self._choices[unit][1].cpu() for unit in chosen]),
        )


def units_of(groups: Sequence[LayerGroup], pool: Pool) -> dict[int, list[Unit]]:
    """Divide the layers into units: layer number -> its units, numbered through the model."""
    found: dict[int, list[Unit]] = {}
    place = itertools.count()
    for group in groups:
        parts = [group] if pool == "layer" else units(group)
        found[group.index] = [
            Unit(next(place), group.index, part.name, tuple(part.parameters.values())) for part in parts
        ]
    return found
