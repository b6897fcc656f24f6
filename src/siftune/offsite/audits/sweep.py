"""Comparison of emulators: their use to the data owner, against the part of the model that they give away.

*Useful* is the cosine between the outer layers' gradients on the base and on the emulator (`gradients.py`). *Given
away* is measured by the loss gap, loss(emulator) − loss(base) on held-out rows, in nats per label token: the wider, the
less the emulator is worth without the base. An emulator for which another has both a higher cosine and a wider gap is
no choice; those that remain are the *front*. The attack on its calibration rows is reported beside
(`calibration_attack`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from torch import Tensor
from transformers import PreTrainedModel

from siftune.base.errors import RecipeError
from siftune.base.files import Progress
from siftune.evaluate.bootstrap import Bootstrap, Estimate
from siftune.offsite.audits.calibration_attack import attack_calibration
from siftune.offsite.audits.gradients import cosine, outer_gradient
from siftune.offsite.audits.models import count, parameter_shares
from siftune.offsite.emulator.assemble import materialise
from siftune.offsite.emulator.compress import Method, Mlp
from siftune.offsite.emulator.make import emulators
from siftune.offsite.emulator.model import Split
from siftune.offsite.emulator.plan import Allotment, EmulatorSettings
from siftune.offsite.maths.drd import Basis

Batches = Sequence[dict[str, Tensor]]

_RESAMPLES = 2000
_AT_ONCE = 4.0  # times the middle's weights that emulators may take while they wait to be measured


@dataclass(frozen=True)
class SweepGrid:
    """The emulators to compare: every method at every kept fraction; for gradot also every basis and λ."""

    keeps: tuple[float, ...] = (0.7, 0.5, 0.3)  # kept fractions, in (0, 1]
    lambdas: tuple[float, ...] = (0.0, 0.1, 0.3)  # values of λ, of attention and MLPs alike
    bases: tuple[Basis, ...] = ("whitened", "svd")  # of gradot
    mlps: tuple[Mlp, ...] = ("refit",)  # what gradot does to them
    methods: tuple[Method, ...] = ("gradot", "layerdrop")
    split: Split = field(default_factory=Split)  # outer layers at either end
    allot: Allotment = "measured"  # how gradot shares out what is kept among matrices

    def check(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: With one sentence on the first value that cannot be used.
        """
        for name in ("keeps", "lambdas", "bases", "mlps", "methods"):
            if not getattr(self, name):
                raise RecipeError(f"{name} is empty: give at least one value, or leave it out")
        for choice in self.settings():
            choice.check()

    def settings(self) -> list[EmulatorSettings]:
        """One setting per emulator, each once."""
        choices = [choice for keep, method in product(self.keeps, self.methods) for choice in self._of(method, keep)]
        return list(dict.fromkeys(choices))

    def _of(self, method: Method, keep: float) -> Iterator[EmulatorSettings]:
        if method != "gradot":
            yield EmulatorSettings(method=method, keep=keep, split=self.split)
        else:
            for basis, mlp, value in product(self.bases, self.mlps, self.lambdas):
                yield EmulatorSettings(
                    keep=keep, lambda_attn=value, lambda_mlp=value, basis=basis, mlp=mlp, split=self.split,
                    allot=self.allot,
                )  # fmt: skip


@dataclass(frozen=True)
class SweepPoint:
    """One emulator."""

    method: str
    keep: float  # fraction that was asked for
    lambda_attn: float  # 0 for methods without λ
    lambda_mlp: float
    basis: str | None  # None for methods other than gradot
    mlp: str | None  # likewise
    cosine: float  # cosine of the outer layers' gradients; NaN where one of them is zero
    loss: float  # its loss on the held-out rows, in nats per label token
    loss_full: float  # the base's
    parameters: int  # its parameters, outer layers and embeddings included; shared ones count once
    middle_share: float  # parameters of its middle over those of the base's
    # AUC of the attack on its calibration rows (`calibration_attack`), the held-out rows being the others; the
    # highest of those on attention, the MLPs and both. Without a value where it has nothing but whole layers
    calibration_auc: Estimate = field(default_factory=Estimate)

    @property
    def gap(self) -> float:
        """Loss of the emulator minus that of the base, in nats per label token."""
        return self.loss - self.loss_full


def sweep(
    model: PreTrainedModel,
    batches: Batches,
    held_out: Batches,
    grid: SweepGrid | None = None,
    progress: Progress | None = None,
) -> list[SweepPoint]:
    """Make every emulator of a grid in memory, and measure it.

    Args:
        model: The base model, without adapters; left as it was.
        batches: Calibration rows, as for `protocol.emulate`.
        held_out: Other rows of the kind, to measure on.
        grid: What to compare; points come in the order of its settings.
        progress: Called for every batch, layer and measurement.

    Raises:
        InputError: On a grid, rows or a model that cannot be used.
        ValueError: No held-out row has a label.
    """
    grid = grid or SweepGrid()
    grid.check()
    choices = grid.settings()
    full = outer_gradient(model, held_out, grid.split)
    points: dict[EmulatorSettings, SweepPoint] = {}
    # forms stay together, because measured costs serve all kept fractions
    for chunk in _chunks(sorted(choices, key=lambda choice: str(choice.form))):
        parts = emulators(model, batches, chunk, progress=progress)
        for choice in chunk:
            emulator = materialise(parts.pop(0)).to(model.device)
            leak = attack_calibration(model, emulator, choice.split, batches, held_out, Bootstrap(_RESAMPLES)).strongest
            likeness = cosine(full, outer_gradient(emulator, held_out, choice.split))
            points[choice] = SweepPoint(
                method=choice.method,
                keep=choice.keep,
                lambda_attn=choice.lambda_attn,
                lambda_mlp=choice.lambda_mlp,
                basis=choice.basis if choice.method == "gradot" else None,
                mlp=choice.mlp if choice.method == "gradot" else None,
                cosine=likeness.overall,
                loss=likeness.loss_emulator,
                loss_full=likeness.loss_full,
                parameters=count(emulator),
                middle_share=parameter_shares(model, emulator, choice.split).middle,
                calibration_auc=Estimate() if leak is None else leak.auc,
            )
            if progress is not None:
                progress("measuring", len(points), len(choices))
    return [points[choice] for choice in choices]


def front(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """The points that no other beats in cosine and gap at once, from the narrowest gap to the widest."""
    unbeaten = [p for p in points if not math.isnan(p.cosine) and not any(_beats(other, p) for other in points)]
    return sorted(unbeaten, key=lambda point: point.gap)


def _beats(a: SweepPoint, b: SweepPoint) -> bool:
    """Whether `a` is at least as good in both, and better in one."""
    return a.cosine >= b.cosine and a.gap >= b.gap and (a.cosine > b.cosine or a.gap > b.gap)


def _chunks(choices: Sequence[EmulatorSettings]) -> Iterator[list[EmulatorSettings]]:
    """Emulators that are made together, from one pass; whole layers are the base's own and take no memory."""
    chunk: list[EmulatorSettings] = []
    size = 0.0
    for choice in choices:
        weight = 0.0 if choice.method == "layerdrop" else choice.keep
        if chunk and size + weight > _AT_ONCE:
            yield chunk
            chunk, size = [], 0.0
        chunk.append(choice)
        size += weight
    if chunk:
        yield chunk
