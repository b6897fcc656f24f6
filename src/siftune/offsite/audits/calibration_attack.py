"""Attack on the calibration rows of a kit, by an attacker who has the base's weights *(ours)*.

The kit's matrices were fitted to the calibration rows, so they leave less out of what the base writes on those rows
than on others of their kind (a row's *residual*). The base runs on a candidate row x; next to every matrix
W of a middle layer that the kit replaced by Ŵ, the kit's matrix gets the same inputs: the channels x_K that it kept, or
all of them if it is factored. Over the real tokens t of the row,

    residual    ln Σ_t ‖W x_t − Ŵ x_t,K‖² − ln Σ_t ‖W x_t‖²

The lower it is beside the residuals of other rows of its kind, the likelier the row calibrated the kit. A row's score
is minus the mean of its residuals over the attention matrices, over the MLP's, or over all. Logarithms, so that the
mean does not depend on the one matrix that loses most.

What the attacker needs besides the kit is the base: any public model, or the owner's own staff. Which channels
a kit's MLP kept is read off its rows, which are the base's own.

An attacker who makes a kit of the same settings from other rows, and scores a candidate by how much more that kit
loses of it, does better: `calibration_leak.py` of the benchmarks measures this.

Shapes: B rows, T positions, O outputs.

Matrices that the kit holds whole are left out, and a kit of whole layers has nothing to look at.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from siftune.base.numerics import in_float64
from siftune.evaluate.bootstrap import Bootstrap, Floats
from siftune.models.families import family_of
from siftune.models.layers import find_layers
from siftune.models.modules import evaluating, model_device
from siftune.offsite.audits.membership import Attack, measure_attack
from siftune.offsite.emulator.model import FactoredLinear, Split, weight_OI

Batches = Sequence[Mapping[str, Tensor]]


KINDS = ("attention", "mlp", "all")

_FLOOR = 1e-12  # relative: what float32 loses; a matrix that left nothing out tells nothing apart


@dataclass(frozen=True)
class CalibrationLeak:
    """Success of the attack: calibration rows against others of their kind."""

    # `attention`, `mlp`, `all`: the mean over those matrices; kinds that the kit holds whole are not there
    attacks: dict[str, Attack]
    # no attack: the base's loss alone. If it tells the sides apart, they differ by source; None where it was not
    # measured
    blind: Attack | None = None

    @property
    def strongest(self) -> Attack | None:
        """The attack of the highest AUC over a kind of matrices; None without any."""
        return max(self.attacks.values(), key=lambda attack: attack.auc.value or 0.0, default=None)


@dataclass(frozen=True)
class Compared:
    """A matrix of the base, and what the kit has in its place."""

    name: str  # number of the layer and path in it, such as `3.mlp.down_proj`
    kind: str  # attention or mlp
    base: nn.Module
    kit: nn.Module
    channels: Tensor | None = None  # (K,) numbers of the inputs that the kit's takes; None for all


def attack_calibration(
    base: PreTrainedModel,
    emulator: nn.Module,
    split: Split,
    rows: Batches,
    others: Batches,
    bootstrap: Bootstrap | None = None,
) -> CalibrationLeak:
    """Tell calibration rows from others.

    Args:
        base: The base model, which is left unchanged.
        emulator: The emulator under attack.
        split: The split of both.
        rows: The rows that calibrated the emulator: (B, T) `input_ids` and `attention_mask`, cut as they were then.
        others: Rows of the same source, cut alike, that did not calibrate it.
        bootstrap: How intervals are drawn.

    Example:
        >>> leak = attack_calibration(base, emulator, split, batches[:1], batches[1:], Bootstrap(100))
        >>> sorted(leak.attacks)
        ['all', 'attention', 'mlp']
    """
    bootstrap = bootstrap or Bootstrap()
    matrices = compared(base, emulator, split)
    members, outsiders = (row_residuals(base, matrices, part) for part in (rows, others))
    attacks = {}
    for kind in KINDS:
        names = [one.name for one in matrices if kind in ("all", one.kind)]
        if names:
            own, other = (-np.mean([side[name] for name in names], axis=0) for side in (members, outsiders))
            attacks[kind] = measure_attack(own, other, bootstrap)
    return CalibrationLeak(attacks)


def compared(base: PreTrainedModel, emulator: nn.Module, split: Split) -> list[Compared]:
    """The middle's matrices that an emulator replaced; none where it has fewer layers than the base: all are whole."""
    layers, others = find_layers(base).layers, find_layers(emulator).layers
    if len(layers) != len(others):
        return []
    family = family_of(base.config)
    matrices = []
    for number in split.middle(len(layers)):
        channels = _channels(layers[number], others[number], family.reads[-1])
        for path in family.matrices:
            one, other = (layer[number].get_submodule(path) for layer in (layers, others))
            narrowed = channels is not None and path == family.writes
            if narrowed or isinstance(other, FactoredLinear):
                kind = "attention" if path in family.attention else "mlp"
                matrices.append(Compared(f"{number}.{path}", kind, one, other, channels if narrowed else None))
    return matrices


def row_residuals(base: PreTrainedModel, matrices: Sequence[Compared], batches: Batches) -> dict[str, Floats]:
    """Residuals of every compressed matrix, from `compared`, on every row of (B, T) `input_ids` and `attention_mask`.

    Returns:
        Name of the matrix -> (R,) residuals, in the order of the rows.
    """
    parts: dict[str, list[Floats]] = {one.name: [] for one in matrices}
    with ExitStack() as undo:
        undo.enter_context(evaluating(base))
        undo.enter_context(torch.no_grad())
        real: list[Tensor] = []
        last = [one.base for one in matrices][-1:]
        for one in matrices:
            undo.callback(one.base.register_forward_hook(partial(_look, one, real, parts[one.name])).remove)
        for module in last:  # what follows costs time and tells nothing
            undo.callback(module.register_forward_hook(_stop).remove)
        for batch in batches:
            real[:] = [batch["attention_mask"].bool().to(model_device(base))]
            inputs = {name: batch[name].to(model_device(base)) for name in ("input_ids", "attention_mask")}
            with suppress(_Seen):
                base.base_model(**inputs, use_cache=False)  # without the head
    return {name: np.concatenate(batches_R) for name, batches_R in parts.items()}


def _look(
    one: Compared, real: list[Tensor], parts: list[Floats], _: nn.Module, args: tuple[Any, ...], output: Tensor
) -> None:
    """Beside a matrix of the base: what would the kit's have written?"""
    inputs = args[0] if one.channels is None else args[0][..., one.channels.to(args[0].device)]
    like = next(one.kit.parameters())
    compressed = one.kit(inputs.to(like.device, like.dtype)).to(output.device, output.dtype)
    shape = (*real[0].shape, -1)  # OPT hands its MLP rows that are flat already
    parts.append(residuals(output.reshape(shape), compressed.reshape(shape), real[0]).cpu().numpy())


def residuals(whole_BTO: Tensor, compressed_BTO: Tensor, real_BT: Tensor) -> Tensor:
    """Share of a matrix's output that its compressed form leaves out, of every row, in logarithms.

    Args:
        whole_BTO: What the base's matrix writes.
        compressed_BTO: What the kit's writes from the same inputs.
        real_BT: bool; false on padding. Every row has a real token.

    Returns:
        (B,) float64; ln 1e-12 where nothing is lost, and where nothing is written.
    """
    lost_BT = in_float64(whole_BTO - compressed_BTO).square().sum(-1)
    size_BT = in_float64(whole_BTO).square().sum(-1)
    lost_B, size_B = ((part_BT * real_BT.to(part_BT.device)).sum(-1) for part_BT in (lost_BT, size_BT))
    share_B = torch.where(size_B > 0, lost_B / size_B, 0.0)
    return share_B.clamp(min=_FLOOR).log()


class _Seen(Exception):
    """All that is to be seen of a batch was seen."""


def _stop(*_: Any) -> None:
    raise _Seen


def _channels(layer: nn.Module, other: nn.Module, path: str) -> Tensor | None:
    """Numbers of the base's channels that an emulator's MLP has, by its rows; None for all."""
    whole, fewer = layer.get_submodule(path), other.get_submodule(path)
    if isinstance(fewer, FactoredLinear):
        return None
    rows, some = weight_OI(whole).detach().float(), weight_OI(fewer).detach().float()
    if len(rows) == len(some):
        return None
    return torch.cdist(some.to(rows.device), rows).argmin(1)
