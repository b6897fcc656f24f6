"""The size of a return's updates, the owner's loss before and after, and the limits of both.

The update of a tensor is measured relative to the tensor, with Frobenius norms. By default it must be below a quarter
*(ours)*:

    a matrix W                         ‖W' − W‖ / ‖W‖
    a bias b beside a weight W         ‖b' − b‖ / ‖[W b]‖     b is one more column of W, and may be zero in the base
    the weight w of a norm             ‖w' − w‖ / ‖g‖         g is the factor: w, in Gemma's norms 1 + w
    another vector                     as a matrix

So tensors of zeros, of another layer or without relation to W are refused: their updates are 1 or more. A bias of zeros
is measured by its weight, a norm of Gemma's by its gain, so that neither needs a floor of its own. Fine-tuning stays
below: 120 steps of 8 rows of arithmetic on SmolLM2-135M's two first and two last layers move no tensor by more than
0.061 with LoRA of rank 32 at a rate of 1e-3, and 0.026 with complete layers at 1e-4 (0.18 at 1e-3, ten times the usual
rate). `siftune verify` shows the updates of any return. A tiny model of small random weights moves further.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from siftune.base.errors import KitError
from siftune.base.numerics import in_float64
from siftune.evaluate.measure import PERPLEXITY, measure
from siftune.evaluate.prepare import Prepared
from siftune.models.families import FAMILIES
from siftune.offsite.exchange.returned import Tuned
from siftune.offsite.exchange.settings import MAX_LOSS_INCREASE, MAX_UPDATE, PlugSettings
from siftune.offsite.kit.folder import Kit, load_weights
from siftune.offsite.kit.manifest import OUTER


@dataclass(frozen=True)
class OwnRows:
    """Rows on which a model must not get worse.

    Attributes:
        prepared: From `evaluate.prepare.prepare_rows`, for the metric `perplexity`.
        max_loss_increase: By how many nats per token the loss may rise.

    Raises:
        RecipeError: The increase is no finite number from 0.
    """

    prepared: Prepared
    max_loss_increase: float = MAX_LOSS_INCREASE

    def __post_init__(self) -> None:
        PlugSettings(max_loss_increase=self.max_loss_increase)  # whose field has the range

    def loss(self, model: nn.Module) -> float:
        """A model's mean loss over all tokens that training would learn, in nats per token."""
        losses = measure(model, self.prepared)[PERPLEXITY]
        return float(losses.values.sum() / losses.weights.sum())


@dataclass(frozen=True)
class LossChange:
    """A model's loss on the owner's rows, in nats per token."""

    before: float  # of the base
    after: float  # of the base with the return in it
    rows: int  # how many
    limit: float  # by how much it may rise

    def check(self) -> None:
        """Refuse a model that got worse.

        Raises:
            KitError: The loss rose by more than the limit, or is no number any more.
        """
        if not self.after - self.before <= self.limit:
            raise KitError(
                f"the return makes the model worse: on your {self.rows} rows its loss goes from {self.before:.4f} to "
                f"{self.after:.4f} nats per token, and may rise by {self.limit:g}: refuse the return, or raise "
                "--max-loss-increase if you expect this"
            )


@dataclass(frozen=True)
class Update:
    """Size of the update of a tensor, or of several together."""

    change: float  # ‖W' − W‖
    norm: float  # ‖W‖
    scale: float  # what `change` is measured by: ‖W‖, but for biases and norms
    lost: float = 0.0  # ‖round(W') − W'‖: the error of storing W' in the base's dtype

    @property
    def relative(self) -> float | None:
        """Change over scale; None where the scale is zero and the change is not."""
        if self.scale:
            return self.change / self.scale
        return None if self.change else 0.0


@dataclass(frozen=True)
class UpdateReport:
    """The updates of a base model by a return.

    Attributes:
        tensors: Neutral name (see `emulator.model.outer_names`) -> update.
        layers: first.0 … last.N -> update of all its tensors.
        limit: Relative updates of tensors must stay below it.
        loss: On the owner's rows; None where none were given.
    """

    tensors: Mapping[str, Update]
    layers: Mapping[str, Update]
    limit: float
    loss: LossChange | None = None

    @property
    def whole(self) -> Update:
        """The update of all tensors side by side."""
        return _together(self.tensors.values())

    @property
    def largest(self) -> str:
        """The tensor of the largest relative update."""
        return max(self.tensors, key=lambda name: _size(self.tensors[name]))

    @property
    def rounding(self) -> float:
        """Norm of the error of rounding to the base's dtype, over that of the whole update; 0 without an update."""
        whole = self.whole
        return whole.lost / whole.change if whole.change else 0.0

    def check(self) -> None:
        """Refuse updates that are not below the limit.

        Raises:
            KitError: The sentence names the tensor of the largest.
        """
        name = self.largest
        size = _size(self.tensors[name])
        if math.isinf(size):
            raise KitError(f"adapter.safetensors of the return: {name} was zero and is no longer: refuse the return")
        if not size < self.limit:
            raise KitError(
                f"adapter.safetensors of the return: {name} moved by {size:.3g} times its norm, and must stay below "
                f"{self.limit:g}: refuse the return, or raise --max-update if you expect this"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON: relative updates by tensor and layer, and losses in nats per token."""
        return {
            "tensors": {name: update.relative for name, update in self.tensors.items()},
            "layers": {name: update.relative for name, update in self.layers.items()},
            "largest": {"tensor": self.largest, "update": self.tensors[self.largest].relative},
            "limit": self.limit,
            "rounding": self.rounding,
            "loss": None if self.loss is None else asdict(self.loss),
        }


def compare(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    limit: float = MAX_UPDATE,
    model_type: str = "",
    dtype: torch.dtype | None = None,
) -> UpdateReport:
    """Measure how far outer layers moved; nothing is refused for having moved too far.

    Args:
        before: Their tensors by neutral name; they are rounded to the dtype in which each came back, that of the kit,
            so that the base and the kit's copy of it give the same report.
        after: The same, tuned; each tensor is asked for once and not kept, but for vectors.
        limit: For the report.
        model_type: Family of the base, in transformers' words.
        dtype: That of the base, by which `lost` is measured; if None, that of `before`.

    Raises:
        KitError: Names or shapes differ, or a tuned number is not finite.
        RecipeError: The limit is no number above 0.
    """
    PlugSettings(max_update=limit)  # whose field has the range
    for name in sorted(before.keys() ^ after.keys()):
        fault = "is missing from" if name in before else "is none of the outer layers', but in"
        raise KitError(f"tensor {name} {fault} the return: give a return of this kit")
    shift = 1.0 if model_type in FAMILIES and FAMILIES[model_type].centred_norms else 0.0
    names = sorted(before)  # so that of two that moved alike the same is named, whatever the order they come in
    alone, vectors = {}, {}
    for name in names:
        new = after[name]
        old = rounded_like(before[name], new)
        alone[name] = _measure(name, old, new, dtype or before[name].dtype)
        if old.ndim == 1:
            vectors[name] = old
    tensors = {name: replace(update, scale=_scale(name, vectors, alone, shift)) for name, update in alone.items()}
    places = dict.fromkeys(map(_layer, tensors))
    layers = {place: _together(u for name, u in tensors.items() if _layer(name) == place) for place in places}
    return UpdateReport(tensors, layers, limit)


def check_return(kit: Kit, returned: Mapping[str, Tensor], limit: float = MAX_UPDATE) -> UpdateReport:
    """Check a return by its kit alone: what is refused, and in which words, is what `plug` refuses.

    The kit's outer layers stand for the base's, which they are a copy of, and the dtype of its frozen part for that of
    the base, which it is unless the owner chose another.

    Args:
        kit: The kit, from `read_kit`.
        returned: What a return holds, from `open_return`, or the outer layers' tensors by neutral name.
        limit: Relative updates of tensors must stay below it.

    Raises:
        KitError: A tensor moved too far, or the kit is not the one that was read any more.
        RecipeError: The limit is no number above 0.
    """
    dtype: torch.dtype = getattr(torch, kit.config["dtype"])
    before = load_weights(kit, OUTER)
    report = compare(before, Tuned(before, returned), limit, kit.manifest.model_type, dtype)
    report.check()
    return report


def rounded_like(before: Tensor, after: Tensor) -> Tensor:
    """A tensor in the dtype of another; of float64 where that can be computed with, since not every device has it."""
    return in_float64(before.detach()) if after.dtype == torch.float64 else before.detach().to(after.dtype)


def _measure(name: str, before: Tensor, after: Tensor, dtype: torch.dtype) -> Update:
    if before.shape != after.shape:
        raise KitError(
            f"tensor {name} of the return has the shape {tuple(after.shape)}, but the base model's has "
            f"{tuple(before.shape)}: give a return of this kit"
        )
    old, new = in_float64(before), in_float64(after.detach().to(before.device))
    rounded = new.to(dtype).double()
    if not bool(rounded.isfinite().all()):
        raise KitError(
            f"tensor {name} of the return holds numbers that are not finite, or too large for {dtype}: refuse the "
            "return"
        )
    norm = float(old.norm())
    return Update(float((new - old).norm()), norm, norm, float((rounded - new).norm()))


def _scale(name: str, vectors: Mapping[str, Tensor], alone: Mapping[str, Update], shift: float) -> float:
    """The scale of a tensor's change."""
    path, _, kind = name.rpartition(".")
    weight = f"{path}.weight"
    if kind == "bias" and weight in alone:
        return math.hypot(alone[name].norm, alone[weight].norm)
    if kind == "weight" and name in vectors:
        return float((in_float64(vectors[name]) + shift).norm())
    return alone[name].norm


def _together(updates: Iterable[Update]) -> Update:
    """Several tensors side by side."""
    parts = list(updates)
    change, norm, lost = (math.hypot(*(getattr(p, field) for p in parts)) for field in ("change", "norm", "lost"))
    return Update(change, norm, norm, lost)


def _layer(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _size(update: Update) -> float:
    """The relative update, for comparison: what was zero has moved by no finite share of itself."""
    return math.inf if update.relative is None else update.relative
