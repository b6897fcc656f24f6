"""The result of sample selection: its units, and the choice in one batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from siftune.base.numerics import has_float64
from siftune.engine.groups import LayerGroup

ALL_LAYERS = -1  # layer number of a choice for all layers


@dataclass(frozen=True, eq=False)
class Unit:
    """A part of the model that chooses samples together: a layer, or all of it."""

    place: int  # its number among the units of the model
    layer: int  # number of its layer; `ALL_LAYERS` for the model
    name: str  # full name of the layer
    parameters: tuple[nn.Parameter, ...]  # its trainable parameters


@dataclass(frozen=True)
class SampleChoice:
    """The choice in one batch.

    Attributes:
        step: Optimizer steps before it.
        batch: Number of the batch within the step, over all ranks.
        units: (U,) names of the layers, from the embeddings; or "model".
        layers: (U,) numbers of the layers; `ALL_LAYERS` for the model.
        scores: (U, S) scores, float32, or float64 if the gradients are; NaN if no scores were needed: all samples are
            followed, or the choice is random.
        selected: (U, K) int64 numbers of the samples in the batch, ascending.
        rows: (S,) int64, the training row of each sample, from 0; None if unknown: see `methods.host.row_numbers`.
    """

    step: int
    batch: int
    units: tuple[str, ...]
    layers: tuple[int, ...]
    scores: Tensor
    selected: Tensor
    rows: Tensor | None = None

    def figures(self) -> dict[str, float]:
        """Summary of the choice over all units.

        Returns:
            `followed`, the share of the samples that are followed, 0 to 1. With scores also `score`, their mean, and
            `score_followed`, the mean over the followed samples.
        """
        figures = {"followed": self.selected.numel() / self.scores.numel()}
        scored = torch.isfinite(self.scores)
        followed = torch.zeros_like(scored).scatter_(1, self.selected, True)
        for name, which in (("score", scored), ("score_followed", scored & followed)):
            if which.any():
                figures[name] = float(self.scores[which].mean())
        return figures


class Choosing:
    """The choice in one batch while backward runs: counts, uniform numbers, and the choices so far.

    Args:
        step: Optimizer steps before it.
        number: Number of the batch within the step, over all ranks.
        samples: Samples S in the batch.
        count: Samples K to choose.
        uniform: (U, S) float64 uniform numbers, one row per unit of the model.
    """

    def __init__(self, step: int, number: int, samples: int, count: int, uniform: Tensor) -> None:
        self.samples = samples
        self.count = count
        self._uniform = uniform
        self._step = step
        self._number = number
        self.rows: Tensor | None = None  # (S,), their numbers in the training set
        self._choices: dict[Unit, tuple[Tensor, Tensor]] = {}

    def uniform_on(self, device: torch.device) -> Tensor:
        """The uniform numbers on a device, copied there once; float64 if it has it."""
        if self._uniform.device != device:
            self._uniform = self._uniform.to(device, torch.float64 if has_float64(device.type) else torch.float32)
        return self._uniform

    def note(self, unit: Unit, scores_S: Tensor | None, chosen_K: Tensor) -> None:
        """Record a unit's choice, sample numbers, and its scores; None if it needed none."""
        missing = torch.full((self.samples,), torch.nan)
        self._choices[unit] = (missing if scores_S is None else scores_S, chosen_K)

    def done(self) -> SampleChoice | None:
        """The choices so far, from the embeddings; None before the first."""
        units = sorted(self._choices, key=lambda unit: unit.place)
        if not units:
            return None
        return SampleChoice(
            self._step,
            self._number,
            tuple(unit.name for unit in units),
            tuple(unit.layer for unit in units),
            torch.stack([self._choices[unit][0].cpu() for unit in units]),
            torch.stack([self._choices[unit][1].cpu() for unit in units]),
            None if self.rows is None else self.rows.cpu(),
        )


def units_of(groups: Sequence[LayerGroup]) -> list[Unit]:
    """Each layer as a unit, numbered through the model."""
    return [Unit(place, part.index, part.name, tuple(part.parameters.values())) for place, part in enumerate(groups)]


def model_unit(groups: Sequence[LayerGroup]) -> Unit:
    """All layers as one unit."""
    return Unit(0, ALL_LAYERS, "model", tuple(p for group in groups for p in group.parameters.values()))
