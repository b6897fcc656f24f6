"""Settings of an emulator, and the plan of its middle: which layers it has, and how much of each matrix stays.

*Measured* shares *(ours)* are allotted by the cost of every matrix at several sizes (`maths.allotment`). A matrix that
is fitted to few rows loses little on them and more on others: v_proj's directions of SmolLM2 lose ten times as much,
the MLP's channels four times. So one half of the calibration tokens chooses and fits, and the costs are those on the
other half. The kit itself is made from all tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from siftune.base.errors import RecipeError, UnsupportedError
from siftune.base.files import Progress
from siftune.models.families import Family
from siftune.offsite.emulator.compress import (
    Compression,
    Parts,
    channel_count,
    components_of,
    score_channels,
)
from siftune.offsite.emulator.curvature import Halves, SumsOfHalves, keep_whole
from siftune.offsite.emulator.model import Base, Split, weight_OI
from siftune.offsite.emulator.record import Recording, replay
from siftune.offsite.maths.allotment import water_fill
from siftune.offsite.maths.channels import costs_of_counts
from siftune.offsite.maths.drd import component_scores, joint_costs, keep_components, rank_of

Allotment = Literal["uniform", "measured"]


@dataclass(frozen=True)
class EmulatorSettings(Compression):
    """Settings of an emulator.

    Attributes:
        split: Outer layers at either end.
        allot: Of gradot. `measured` *(ours)*: what is kept is distributed by what each matrix would lose. `uniform`:
            all keep the same share.

    Example:
        >>> EmulatorSettings(keep=0.5, split=Split(first=1, last=1)).keep
        0.5
    """

    split: Split = field(default_factory=Split)
    allot: Allotment = "measured"

    @property
    def measures(self) -> bool:
        """Whether the plan needs costs."""
        return self.method == "gradot" and self.allot == "measured" and self.keep < 1

    @property
    def form(self) -> "EmulatorSettings":
        """The settings that measured costs depend on: all but `keep`."""
        return replace(self, keep=1.0)

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
            if not 0 < getattr(self, name) < float("inf"):
                raise RecipeError(f"{name} is {getattr(self, name)}, but must be a finite number above 0")
        if self.lambda_unit != "relative" and not (self.lambda_attn or self.lambda_mlp):
            raise RecipeError(f"lambda_unit is {self.lambda_unit}, but both λ are 0: give one, or leave the unit out")
        if (self.parts == "mlp" and self.lambda_attn) or (self.parts == "attention" and self.lambda_mlp):
            name = "lambda_attn" if self.parts == "mlp" else "lambda_mlp"
            raise RecipeError(f"{name} has no effect, because parts is {self.parts}: leave it out, or use parts both")
        whole_layers = self.method == "layerdrop"
        if whole_layers and self.parts != "both":
            raise RecipeError(f"parts is {self.parts}, but method layerdrop drops whole layers: use parts both")
        if whole_layers and (self.lambda_attn or self.lambda_mlp):
            raise RecipeError("method layerdrop drops whole layers: it has no λ")
        if not whole_layers and self.allot == "measured" and self.keep < SHARES[0]:
            raise RecipeError(
                f"keep is {self.keep}, but allot measured leaves {SHARES[0]} of every matrix or more: use allot uniform"
            )


@dataclass(frozen=True)
class Step:
    """One layer of an emulator's middle."""

    number: int  # number of the base's layer that it comes from
    keep: float = 1.0  # fraction of its matrices' parameters that stays
    # fractions by path of the matrix, in place of one for all; see `Compression`
    shares: Mapping[str, float] | None = None


def plan(base: Base, recording: Recording, settings: EmulatorSettings, progress: Progress | None = None) -> list[Step]:
    """Plan the middle by checked settings; costs that are not there yet are measured.

    Raises:
        UnsupportedError: Layers are to be dropped in a model whose layers depend on their number.
    """
    numbers = recording.numbers
    if settings.method == "layerdrop":
        if getattr(base.model.config, "scale_attn_by_inverse_layer_idx", False):  # of GPT-2
            raise UnsupportedError(
                "method layerdrop drops layers, but this model scales attention by the number of the layer "
                "(scale_attn_by_inverse_layer_idx); use method gradot"
            )
        count = max(1, round(settings.keep * len(numbers)))
        return [Step(numbers[place]) for place in uniform_layers(len(numbers), count)]
    if settings.measures:
        measure(base, recording, [settings], progress)
        measured = measured_shares(base, recording, settings)
        return [Step(number, settings.keep, shares=measured[number]) for number in numbers]
    return [Step(number, settings.keep) for number in numbers]


def uniform_layers(count: int, kept: int) -> list[int]:
    """Choose evenly spaced layers, as offsite-tuning's layer drop (arXiv 2302.04870): both ends and K−2 between them.

    Ours: a single one is that in the middle, and none may stay.

    Args:
        count: Layers of the middle.
        kept: K, number of them that stay, from 0.

    Returns:
        K numbers from 0 to `count` − 1, ascending.

    Raises:
        RecipeError: K is not from 0 to `count`.

    Example:
        >>> uniform_layers(20, 4)
        [0, 6, 13, 19]
    """
    if not 0 <= kept <= count:
        raise RecipeError(f"{kept} of {count} middle layers would stay; give a number from 0 to {count}")
    if kept == 1:
        return [count // 2]
    return [round(i * ((count - 1) / (kept - 1))) for i in range(kept)]


SHARES = tuple(number / 20 for number in range(2, 21))  # at 1 a matrix is whole, and costs nothing


def measured_paths(family: Family, parts: Parts = "both") -> tuple[str, ...]:
    """The matrices with a share: those of attention, and the write matrix for the complete MLP."""
    attention = () if parts == "mlp" else family.attention
    return attention if parts == "attention" else (*attention, family.writes)


def layer_costs(base: Base, number: int, seen: Halves, how: Compression) -> list[Tensor]:
    """Parameters and costs of a layer's matrices at every share of `SHARES`.

    `seen` has the matrices of `how.judged`; what the settings keep has no part.

    Returns:
        (2, S) float64 for each of `measured_paths`: parameters, then what is lost.
    """
    layer, family = base.layers[number], base.family
    weights = {path: weight_OI(layer.get_submodule(path)).detach().float() for path in how.judged(family)}
    return [
        _factored(path, weights[path], seen, how) if path in family.attention else _narrowed(weights, family, seen, how)
        for path in measured_paths(family, how.parts)
    ]


def _factored(path: str, weight: Tensor, seen: Halves, how: Compression) -> Tensor:
    """A matrix that becomes a product of two."""
    chosen, other = seen.chosen.curvature[path], seen.other.curvature[path]
    parts = components_of(path, weight, seen.chosen, how)
    scores_K = component_scores(parts, chosen, how.lambda_attn, how.lambda_unit)
    ranks = [rank_of(share, *weight.shape) for share in SHARES[:-1]]
    choices = [keep_components(scores_K, parts.size_K, rank, how.protect) for rank in ranks]
    sizes = [float(rank * sum(weight.shape)) for rank in ranks]
    return _table([*sizes, float(weight.numel())], [*joint_costs(parts, other, choices), 0.0])


def _narrowed(weights: Mapping[str, Tensor], family: Family, seen: Halves, how: Compression) -> Tensor:
    """An MLP that loses channels: what is lost is what it writes."""
    write_OC, (outputs, channels) = weights[family.writes], weights[family.writes].shape
    per_channel = outputs * (1 + len(family.reads))  # what an MLP reads is as wide as what it writes
    scores_C = score_channels(weights, family, seen.chosen, how)
    counts = [channel_count(share, channels) for share in SHARES[:-1]]
    fit = seen.chosen.curvature[family.writes].inputs if how.mlp == "refit" else None
    costs = costs_of_counts(write_OC, seen.other.curvature[family.writes], scores_C, counts, fit, how.refit_damping)
    return _table([float(count * per_channel) for count in (*counts, channels)], [*costs, 0.0])


def _table(sizes: Sequence[float], costs: Sequence[float]) -> Tensor:
    return torch.tensor([sizes, costs], dtype=torch.float64)


def measure(
    base: Base, recording: Recording, choices: Sequence[EmulatorSettings], progress: Progress | None = None
) -> None:
    """Measure the costs that plans need, each layer once for all choices, from the last layer to the first.

    Costs lie with the recording's states, so that an interrupted run continues.
    """
    forms = list(dict.fromkeys(choice.form for choice in choices if choice.measures))
    slopes = any(choice.lambda_attn or choice.lambda_mlp for choice in choices)
    if forms and progress is not None:
        progress("costs", 0, len(recording.numbers))
    for done, number in enumerate(reversed(recording.numbers) if forms else (), 1):
        if missing := [form for form in forms if not recording.costs(form).has(number)]:
            _measure_one(base, recording, number, missing, slopes)
        if number < recording.numbers[-1]:
            recording.grads.drop(number)  # compression computes them again
        if progress is not None:
            progress("costs", done, len(recording.numbers))


def _measure_one(
    base: Base, recording: Recording, number: int, forms: Sequence[EmulatorSettings], slopes: bool
) -> None:
    """Measure the costs of a layer; a function of its own, so that nothing of the layer is left in memory."""
    paths = dict.fromkeys(path for form in forms for path in form.judged(base.family))
    sums = SumsOfHalves(recording.positions, slopes)
    replay(base, recording, number, list(paths), sums.add)
    seen = sums.halves()
    if not slopes:  # compression with a λ computes all again, since slopes are not kept
        keep_whole(recording.curvature, number, seen, recording.positions)
    for form in forms:
        recording.costs(form).put(number, layer_costs(base, number, seen, form))


def measured_shares(base: Base, recording: Recording, how: EmulatorSettings) -> dict[int, dict[str, float]]:
    """Share out what is kept, `how.keep` of the parameters of all matrices that are compressed, by what each costs.

    Returns:
        Number of the layer -> path -> share.
    """
    costs_of, paths = recording.costs(how.form), measured_paths(base.family, how.parts)
    tables: dict[tuple[int, str], tuple[list[float], list[float]]] = {}
    for number in recording.numbers:
        for path, table in zip(paths, costs_of.get(number), strict=True):
            sizes, costs = table.tolist()
            tables[number, path] = sizes, costs
    every = [sizes for sizes, _ in tables.values()]
    places = water_fill(every, [costs for _, costs in tables.values()], how.keep * sum(one[-1] for one in every))
    shares: dict[int, dict[str, float]] = {number: {} for number in recording.numbers}
    for (number, path), place in zip(tables, places, strict=True):
        shares[number][path] = SHARES[place]
    return shares
