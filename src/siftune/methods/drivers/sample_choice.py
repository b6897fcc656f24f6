"""The result of sample selection: its units, and the choice in one batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from siftune.base.numerics import copies_asynchronously, has_float64
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
        self._choices: dict[Unit, tuple[Tensor | None, Tensor]] = {}
        self._done: SampleChoice | None = None  # of the choices so far, once they were copied to the host

    def uniform_on(self, device: torch.device) -> Tensor:
        """The uniform numbers on a device, copied there once; float64 if it has it."""
        if self._uniform.device != device:
            dtype = torch.float64 if has_float64(device.type) else torch.float32
            self._uniform = self._uniform.to(dtype).to(device, non_blocking=copies_asynchronously(device.type))
        return self._uniform

    def note(self, unit: Unit, scores_S: Tensor | None, chosen_K: Tensor) -> None:
        """Record a unit's choice, sample numbers, and its scores; None if it needed none."""
        self._choices[unit] = (scores_S, chosen_K)
        self._done = None

    def done(self) -> SampleChoice | None:
        """The choices so far, from the embeddings; None before the first."""
        units = sorted(self._choices, key=lambda unit: unit.place)
        if self._done is None and units:
            scores_US, chosen_UK = self._on_host([self._choices[unit] for unit in units])
            names, layers = tuple(unit.name for unit in units), tuple(unit.layer for unit in units)
            self._done = SampleChoice(self._step, self._number, names, layers, scores_US, chosen_UK, self.rows)
        return self._done

    def _on_host(self, choices: Sequence[tuple[Tensor | None, Tensor]]) -> tuple[Tensor, Tensor]:
        """Scores (U, S) and sample numbers (U, K) on the CPU, by one copy: the host waits for the device once."""
        device = choices[0][1].device
        chosen_UK = torch.stack([chosen.to(device) for _, chosen in choices])
        scores = [score.to(device) for score, _ in choices if score is not None]
        if not scores:
            return torch.full((len(choices), self.samples), torch.nan), chosen_UK.cpu()
        scores_US = torch.stack(scores)
        both = torch.cat([scores_US, chosen_UK.to(scores_US.dtype)], 1).cpu()  # float32 has all integers to 2^24
        return both[:, : self.samples].clone(), both[:, self.samples :].long()


def units_of(groups: Sequence[LayerGroup]) -> list[Unit]:
    """Each layer as a unit, numbered through the model."""
    return [Unit(place, part.index, part.name, tuple(part.parameters.values())) for place, part in enumerate(groups)]


def model_unit(groups: Sequence[LayerGroup]) -> Unit:
    """All layers as one unit."""
    return Unit(0, ALL_LAYERS, "model", tuple(p for group in groups for p in group.parameters.values()))
