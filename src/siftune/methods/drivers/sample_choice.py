"""What sample selection chose: its units, and the choice in one batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from siftune.engine.groups import LayerGroup

WHOLE = -1  # in the place of a layer's number: one choice for all layers


@dataclass(frozen=True, eq=False)
class Unit:
    """What chooses samples together: a layer, or the model."""

    place: int  # its number among the units of the model
    layer: int  # number of its layer; `WHOLE` for the model
    name: str  # full name of the layer
    parameters: tuple[nn.Parameter, ...]  # those that train


@dataclass(frozen=True)
class SampleChoice:
    """The choice in one batch.

    Attributes:
        step: Optimizer steps done before it.
        batch: Number of the batch within the step, over all ranks.
        units: (U,) names of the layers, from the embeddings; or "model".
        layers: (U,) numbers of the layers; `WHOLE` for the model.
        scores: (U, S) scores, float32, or float64 where the gradients are; NaN where none were needed: all samples
            are followed, or a random choice.
        selected: (U, K) int64 numbers of the samples in the batch, ascending. Where units follow different numbers of
            samples, as GAST's do with `among="recent"`, K is the largest, and -1 stands behind the others' numbers.
        rows: (S,) int64, which row of the training set each sample is, from 0; None where that is not known: see
            `methods.row_numbers`.
    """

    step: int
    batch: int
    units: tuple[str, ...]
    layers: tuple[int, ...]
    scores: Tensor
    selected: Tensor
    rows: Tensor | None = None

    def followed(self) -> list[list[int]]:
        """Numbers of the samples that each unit follows, ascending: `selected` without the -1."""
        return [[number for number in numbers if number >= 0] for numbers in self.selected.tolist()]

    def figures(self) -> dict[str, float]:
        """The choice in a few figures.

        Returns:
            `followed`, the share of the samples that were followed, 0 to 1; and where there are scores `score`, their
            mean, and `score_followed`, that of the samples that were followed. All over the units together.
        """
        real, samples = self.selected >= 0, self.scores.shape[1]
        found = {"followed": float(real.sum()) / self.scores.numel()}
        known = torch.isfinite(self.scores)
        chosen = torch.zeros(len(self.scores), samples + 1, dtype=torch.bool)  # one place more, for what is none
        chosen.scatter_(1, self.selected.where(real, samples), True)
        for name, which in (("score", known), ("score_followed", known & chosen[:, :samples])):
            if which.any():
                found[name] = float(self.scores[which].mean())
        return found


class Choosing:
    """One batch while the choice goes on: counts, uniform numbers, and the choices so far.

    Its `number` is that within the step, over all ranks; K = `count` of S = `samples` are to be chosen. `uniform` are
    (U, S) float64 uniform numbers, one row per unit of the model; (U, 1) where samples are chosen as they come.
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
        """The uniform numbers on a device, brought there once; float64, or float32 where it has no other."""
        if self._uniform.device != device:
            self._uniform = self._uniform.to(device, torch.float32 if device.type == "mps" else torch.float64)
        return self._uniform

    def note(self, unit: Unit, scores_S: Tensor | None, chosen: Tensor) -> None:
        """Keep a unit's choice, numbers (K,) or bool (S,), and its scores; None where it needed none."""
        missing = torch.full((self.samples,), torch.nan)
        self._choices[unit] = (missing if scores_S is None else scores_S, chosen)

    def done(self) -> SampleChoice | None:
        """The choices so far, from the embeddings; None before the first."""
        chosen = sorted(self._choices, key=lambda unit: unit.place)
        if not chosen:
            return None
        return SampleChoice(
            self._step,
            self._number,
            tuple(unit.name for unit in chosen),
            tuple(unit.layer for unit in chosen),
            torch.stack([self._choices[unit][0].cpu() for unit in chosen]),
            pad_sequence([_numbers(self._choices[unit][1].cpu()) for unit in chosen], True, -1),
            None if self.rows is None else self.rows.cpu(),
        )


def _numbers(chosen: Tensor) -> Tensor:
    """Numbers of chosen samples, (K,), which they may be already."""
    return chosen.nonzero().squeeze(1) if chosen.dtype == torch.bool else chosen


def units_of(groups: Sequence[LayerGroup]) -> list[Unit]:
    """Each layer as a unit, numbered through the model."""
    return [Unit(place, part.index, part.name, tuple(part.parameters.values())) for place, part in enumerate(groups)]


def whole_model(groups: Sequence[LayerGroup]) -> Unit:
    """All layers as one unit."""
    return Unit(0, WHOLE, "model", tuple(p for group in groups for p in group.parameters.values()))
