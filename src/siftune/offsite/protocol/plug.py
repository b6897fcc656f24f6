"""The owner's way back: check what a data owner returned, and put it into the base model.

How far a returned tensor W' is from the base's W is measured by

    ‖W' − W‖ / ‖W‖      (Frobenius norms)

and limited, by default to 1 (ours). A matrix above 1 was replaced rather than tuned: one that has nothing to do with W
has ‖W' − W‖² = ‖W'‖² + ‖W‖² on average, which is more whatever its scale. Fine-tuning stays far below. Vectors (norms,
biases) have no limit of their own, since W may be zero in them; but the limit also holds for every layer, all of its
tensors side by side.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from siftune.errors import KitError, RecipeError, UnsupportedError
from siftune.files import new_folder
from siftune.models.source import load_model, quiet_bars
from siftune.offsite.emulator.split import outer_names
from siftune.offsite.kit.fingerprint import fingerprint
from siftune.offsite.kit.folder import Kit
from siftune.offsite.protocol.returned import read_return

logger = logging.getLogger(__name__)

MAX_UPDATE = 1.0
_SHORT = 12  # hex digits of a hash in messages
_TELL = 0.1  # (ours) share of the update that a rounding error may have without a word


@dataclass(frozen=True)
class Update:
    """How far a tensor, or several side by side, moved.

    Attributes:
        change: ‖W' − W‖.
        norm: ‖W‖.
        lost: ‖round(W') − W'‖: the error of storing W' in W's dtype.
    """

    change: float
    norm: float
    lost: float = 0.0

    @property
    def relative(self) -> float | None:
        """‖W' − W‖ / ‖W‖; None where W is zero and W' is not."""
        if self.norm:
            return self.change / self.norm
        return None if self.change else 0.0


@dataclass(frozen=True)
class UpdateReport:
    """What a return changes in a base model.

    Attributes:
        tensors: Neutral name (see `emulator.split`) -> update.
        layers: first.0 … last.N -> update of all its tensors.
        matrices: Names of the tensors that have the limit.
        limit: Largest relative update of a matrix or layer that is accepted.
    """

    tensors: Mapping[str, Update]
    layers: Mapping[str, Update]
    matrices: tuple[str, ...]
    limit: float

    @property
    def largest(self) -> str:
        """The matrix of the largest relative update."""
        return max(self.matrices, key=lambda name: _size(self.tensors[name]))

    @property
    def rounding(self) -> float:
        """Norm of the error of rounding to the base's dtype, over that of the whole update; 0 without an update."""
        whole = _together(self.tensors.values())
        return whole.lost / whole.change if whole.change else 0.0

    def check(self) -> None:
        """Refuse updates above the limit.

        Raises:
            KitError: A matrix or a layer is above it; the sentence names the largest.
        """
        limited = {name: self.tensors[name] for name in self.matrices} | {**self.layers}
        above = {name: _size(update) for name, update in limited.items() if not _size(update) <= self.limit}
        if above:
            name = max(above, key=lambda name: above[name])
            raise KitError(
                f"adapter.safetensors of the return: {name} moved by {above[name]:.3g} times its norm, more than the "
                f"limit of {self.limit:g}: refuse the return, or raise --max-update if you expect this"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON: relative updates by tensor and layer."""
        return {
            "tensors": {name: update.relative for name, update in self.tensors.items()},
            "layers": {name: update.relative for name, update in self.layers.items()},
            "largest": {"tensor": self.largest, "update": self.tensors[self.largest].relative},
            "limit": self.limit,
            "rounding": self.rounding,
        }


@dataclass(frozen=True)
class PlugResult:
    """A base model with returned layers in it, on disk.

    Attributes:
        folder: Where it is.
        dtype: Its dtype, such as bfloat16.
        kit: The kit that the return answers.
        report: What changed.
    """

    folder: Path
    dtype: str
    kit: Kit
    report: UpdateReport


def plug(
    model_source: str,
    kit: Kit,
    return_path: str | Path,
    out: str | Path,
    *,
    max_update: float = MAX_UPDATE,
    dtype: str = "auto",
) -> PlugResult:
    """Put a return into the base model, and save an ordinary model that needs neither kit nor siftune.

    Args:
        model_source: The base model that the kit was made from, for `load_model`.
        kit: The kit that was handed out, from `read_kit`.
        return_path: The return's folder.
        out: Folder of the plugged model; must be new or empty.
        max_update: Largest relative update of a matrix or layer that is accepted.
        dtype: float32, bfloat16, float16, or auto: the checkpoint's, also where this machine computes in another.

    Raises:
        InputError: On a return, model or folder that cannot be used; nothing is written then.
    """
    returned = read_return(return_path, kit)
    with new_folder(out) as partial:
        model, tokenizer = load_model(model_source, dtype)
        if dtype == "auto":
            model = model.to(model.config.dtype or model.dtype)  # back from float32 without a loss
        report = plug_in(model, kit, returned, max_update)
        with quiet_bars():
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    logger.info("plugged model in %s", out)
    return PlugResult(Path(out), str(model.dtype).removeprefix("torch."), kit, report)


def plug_in(
    model: PreTrainedModel, kit: Kit, returned: Mapping[str, Tensor], max_update: float = MAX_UPDATE
) -> UpdateReport:
    """Put returned tensors into the outer layers of a base model, in place and in the model's dtype.

    Args:
        model: The base model, without PEFT around it, its weights in memory.
        kit: The kit that was handed out.
        returned: The outer layers' tensors by neutral name, from `read_return`.
        max_update: Largest relative update of a matrix or layer that is accepted.

    Returns:
        How far every tensor and layer moved.

    Raises:
        KitError: The model is not the kit's base, the tensors are not those of the kit's outer layers, or an update is
            above the limit. The model is as it was then.
        RecipeError: The limit is no number above 0.
        UnsupportedError: Weights of the model are not in memory.

    Example:
        >>> report = plug_in(base, kit, returned)  # from `read_return`; here nothing was tuned
        >>> report.rounding
        0.0
    """
    _check_base(model, kit)
    names = outer_names(model, kit.manifest.split)
    state = model.state_dict()
    before = {neutral: state[name] for neutral, name in names.items()}
    report = compare(before, returned, max_update)
    report.check()
    with torch.no_grad():
        for neutral, tensor in returned.items():
            before[neutral].copy_(tensor)
    if report.rounding > _TELL:
        logger.warning(
            "rounding to %s adds an error of %.0f %% of the update's norm; --dtype float32 avoids it",
            str(model.dtype).removeprefix("torch."),
            100 * report.rounding,
        )
    return report


def compare(before: Mapping[str, Tensor], after: Mapping[str, Tensor], limit: float = MAX_UPDATE) -> UpdateReport:
    """Measure how far outer layers moved; nothing is refused for being above the limit.

    Args:
        before: Its tensors by neutral name; `lost` is what their dtypes round away.
        after: The same, tuned.
        limit: For the report.

    Raises:
        KitError: Names or shapes differ, or a tuned number is not finite.
        RecipeError: The limit is no number above 0.
    """
    if not 0 < limit < math.inf:
        raise RecipeError(f"the largest update is {limit}, but must be a finite number above 0")
    for name in sorted(before.keys() ^ after.keys()):
        fault = "is missing from" if name in before else "is none of the outer layers', but in"
        raise KitError(f"tensor {name} {fault} the return: give a return of this kit")
    tensors = {name: _measure(name, tensor, after[name]) for name, tensor in before.items()}
    places = dict.fromkeys(map(_layer, tensors))
    layers = {place: _together(u for name, u in tensors.items() if _layer(name) == place) for place in places}
    matrices = tuple(name for name, tensor in before.items() if tensor.ndim > 1)
    return UpdateReport(tensors, layers, matrices, limit)


def _check_base(model: PreTrainedModel, kit: Kit) -> None:
    """Refuse a model that the kit was not made from."""
    if any(tensor.device.type == "meta" for tensor in model.state_dict().values()):
        raise UnsupportedError("weights of the model are not in memory: load it on one device, the processor will do")
    own, of_kit = fingerprint(model), kit.manifest.fingerprint
    if own != of_kit:
        raise KitError(
            f"the kit {kit.path} was made from a model with fingerprint {of_kit[:_SHORT]}…, but this one has "
            f"{own[:_SHORT]}…: give the kit's own base model, with the --dtype that the kit was made with"
        )


def _measure(name: str, before: Tensor, after: Tensor) -> Update:
    if before.shape != after.shape:
        raise KitError(
            f"tensor {name} of the return has the shape {tuple(after.shape)}, but the base model's has "
            f"{tuple(before.shape)}: give a return of this kit"
        )
    old, new = before.detach().double(), after.detach().to(before.device).double()
    rounded = new.to(before.dtype).double()
    if not bool(rounded.isfinite().all()):
        raise KitError(
            f"tensor {name} of the return holds numbers that are not finite, or too large for {before.dtype}: refuse "
            "the return"
        )
    return Update(float((new - old).norm()), float(old.norm()), float((rounded - new).norm()))


def _together(updates: Iterable[Update]) -> Update:
    """Several tensors side by side."""
    parts = list(updates)
    return Update(*(math.hypot(*(getattr(p, field) for p in parts)) for field in ("change", "norm", "lost")))


def _layer(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _size(update: Update) -> float:
    return math.inf if update.relative is None else update.relative
