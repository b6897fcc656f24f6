"""Gradients of all rows in dense training: lengths, alignments, and margins of the label logits.

Every row is followed, so training is unchanged except for rounding. With g_i the gradient of row i for a
layer, m their mean over earlier steps (decay 0.9), and sums over all layers:

    norm        √ Σ ‖g_i‖²
    inner       Σ ⟨g_i, Σ_{j≠i} g_j⟩, with the rest of the batch
    cosine      Σ cos(g_i, Σ_{j≠i} g_j)
    mean        Σ cos(g_i, m)
    one         cos(g_i, Σ_{j≠i} g_j) of the middle layer alone

The margin of a label is its logit minus the largest other; of a row, the mean over its labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from siftune.base import numerics
from siftune.base.settings import Settings
from siftune.engine.groups import LayerGroup
from siftune.engine.tape import SampleGradients
from siftune.methods.drivers.sample_callback import SampleCallback
from siftune.methods.drivers.sample_choice import Choosing, Unit, units_of
from siftune.methods.drivers.support import Gradients
from siftune.methods.host.callback import calling_trainer
from siftune.methods.host.row_numbers import row_numbers
from siftune.models.loss import label_positions, next_labels

NAMES = ("norm", "inner", "cosine", "mean", "one")
_DECAY = 0.9


class Watching:
    """A rule that follows all rows, and records how their gradients align.

    Args:
        groups: The layers.
    """

    at_once, always, select = False, True, 1.0
    stream, support = None, None

    def __init__(self, groups: Sequence[LayerGroup]) -> None:
        self.units: Sequence[Unit] = units_of(groups)
        self.optimizer: Any = None
        self.mean: Gradients = {}
        self.found: dict[str, Tensor] = {}  # (S,) of the batch at work
        self._sums: Gradients = {}
        self._unit = {unit.layer: unit for unit in self.units}
        self._middle = self.units[len(self.units) // 2].layer

    def follows_all(self, steps: int) -> bool:
        """Never: the rule is asked for every batch."""
        return False

    def reduce(self, choosing: Choosing, layers: Sequence[tuple[LayerGroup, SampleGradients]]) -> Gradients:
        """Note the layers' gradients, and add them up."""
        reduced: Gradients = {}
        for group, grads in layers:
            choosing.note(self._unit[group.index], None, torch.arange(choosing.samples))
            for name, values in self._layer(grads, group.index == self._middle).items():
                self.found[name] = self.found[name] + values if name in self.found else values
            reduced |= {p: numerics.total(part).view(part.shape[1:]) for p, part in grads.items()}
        self._sums = {**self._sums, **{p: self._sums.get(p, 0) + grad for p, grad in reduced.items()}}
        return reduced

    def end(self) -> None:
        """Move the mean over steps."""
        self.mean = {
            p: self.mean[p].lerp(grad, 1 - _DECAY) if p in self.mean else grad for p, grad in self._sums.items()
        }
        self._sums = {}

    def _layer(self, grads: SampleGradients, middle: bool) -> dict[str, Tensor]:
        squares, dots, wholes = ([of(p, part) for p, part in grads.items()] for of in (_square, _dot, _whole))
        square, dot, whole = (numerics.added(part) for part in (squares, dots, wholes))
        inner, rest = dot - square, whole - 2 * dot + square  # with the rest of the batch; its squared length
        cosine = _cosine(inner, square, rest)
        found = {"norm": square, "inner": inner, "cosine": cosine, "mean": self._to_mean(grads, square)}
        return {**found, "one": cosine if middle else torch.zeros_like(cosine)}

    def _to_mean(self, grads: SampleGradients, square: Tensor) -> Tensor:
        known = {p: self.mean[p] for p in grads if p in self.mean}
        if not known:
            return torch.zeros_like(square)
        dot = numerics.added([numerics.products(grads[p], mean) for p, mean in known.items()])
        length = sum(mean.float().square().sum() for mean in known.values())
        return _cosine(dot, square, torch.as_tensor(length).expand_as(dot))


def _square(_: nn.Parameter, part: Tensor) -> Tensor:
    return numerics.squares(part)


def _dot(_: nn.Parameter, part: Tensor) -> Tensor:
    return numerics.products(part, numerics.total(part))


def _whole(_: nn.Parameter, part: Tensor) -> Tensor:
    return numerics.total(part).square().sum().expand(len(part))


def _cosine(dot: Tensor, one: Tensor, other: Tensor) -> Tensor:
    lengths = (one.clamp_min(0) * other.clamp_min(0)).sqrt()
    return torch.where(lengths > 0, dot / lengths.clamp_min(torch.finfo(dot.dtype).tiny), 0.0)


@dataclass
class _NoSettings(Settings):
    """No settings."""

    group: ClassVar[str] = "watch"
    select: ClassVar[float] = 1.0


@dataclass(eq=False)
class Watch(SampleCallback, _NoSettings):
    """A callback that records these values for every row of every batch."""

    def __post_init__(self) -> None:
        """Begin with nothing."""
        super().__post_init__()
        self._kept: list[NDArray[np.float64]] = []
        self._margins: Tensor | None = None
        self.on_select = self._keep

    def rule(self, groups: Sequence[LayerGroup]) -> Watching:
        """Watch all layers."""
        self.watching = Watching(groups)
        return self.watching

    @property
    def support_source(self) -> None:
        """There is no support set."""
        return None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add a hook on the logits."""
        super().on_train_begin(args, state, control, **kwargs)
        self._batch = row_numbers(calling_trainer(self))
        self._hook = kwargs["model"].register_forward_hook(self._look)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the hooks."""
        self._hook.remove()
        self._batch.release()
        super().on_train_end(args, state, control, **kwargs)

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """Recorded values, one for each row of every batch, in the order of steps, and of rows within a step."""
        table = np.concatenate(self._kept, axis=1)
        table = table[:, np.lexsort((table[1], table[0]))]
        found = dict(zip(("step", "row", *NAMES, "margin"), table, strict=True))
        return {**found, "norm": np.sqrt(found["norm"])}

    def _look(self, _: Any, __: Any, output: Any) -> None:
        if self._batch.at_work and torch.is_grad_enabled():
            labels_BT = self._batch.labels
            logits = output.logits.detach()
            everywhere = logits.shape[:2] == labels_BT.shape  # in another Trainer than siftune's
            self._margins = margins(logits[label_positions(labels_BT)] if everywhere else logits[0], labels_BT)

    def _keep(self, choice: Any) -> None:
        parts = [self.watching.found[name].double() for name in NAMES] + [self._margins.double()]
        steps = torch.full((len(choice.rows),), choice.step, dtype=torch.float64)
        self._kept.append(torch.stack([steps, choice.rows.double(), *(part.cpu() for part in parts)]).numpy())
        self.watching.found = {}


def margins(logits_NV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean margin of every row's labels; (B,).

    Args:
        logits_NV: (N, V) logits at the labels.
        labels_BT: (B, T) labels.
    """
    top_N2 = logits_NV.float().topk(2).values
    own_N = logits_NV.float().gather(1, next_labels(labels_BT)[:, None])[:, 0]
    other_N = torch.where(own_N == top_N2[:, 0], top_N2[:, 1], top_N2[:, 0])
    row_N = label_positions(labels_BT).nonzero()[:, 0]
    sums_2B = own_N.new_zeros(2, len(labels_BT))
    sums_2B.index_add_(1, row_N, torch.stack([own_N - other_N, torch.ones_like(own_N)]))
    return sums_2B[0] / sums_2B[1]
