"""A short distillation of compressed layers, one after the other; an option, since GradOT is training-free *(ours)*.

Offsite-tuning (Xiao, Lin and Han, 2023, arXiv 2302.04870; mit-han-lab/offsite-tuning) distils its emulator of whole
layers on a large corpus, by the next token's loss and the error of the hidden states that leave the middle; ScaleOT
(Yao et al., AAAI 2025, arXiv 2412.09812) trains small networks in the place of layers. Here there is no corpus but the
calibration rows, and a layer at a time in memory: each is given what the compressed layers below give, x̂, and learns to
put out what the base's puts out where nothing below is compressed, y, by

    error    mean over tokens of ‖f(x̂) − y‖² / ‖y‖²

Relative, since the first token of a row is a hundred times as long as the others in some layers of some models. The
steps are Adam's, over the batches in their order, with a learning rate relative to each tensor's size, which falls to
zero. A layer that got no better on these rows stays as it was.

What learns are the factors and the MLP's write matrix. The rows by which an MLP's channels read stay the base's own,
as they are in any kit, so that a further round finds them (`protocol.rounds`). Factors end in canonical form.
Nothing is drawn: a run that was cut and goes on gives the same layer, bit for bit.

Shapes: B rows, T positions, H hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from siftune.base.numerics import widened
from siftune.models.families import Family
from siftune.models.modes import trainable_only
from siftune.offsite.emulator.compress import CompressedLayer
from siftune.offsite.emulator.model import reshape
from siftune.offsite.emulator.recording import Recording, own
from siftune.offsite.maths.drd import canonical

RATE = 3e-3  # of Adam, times the root mean square of the tensor


@dataclass(frozen=True)
class Prefix:
    """What the compressed layers below give a layer: x̂, (B, T, H) per batch; and how its model calls it."""

    number: int
    recording: Recording
    hidden: Sequence[Tensor] = field(repr=False)

    def outputs(self, layer: nn.Module, family: Family, made: CompressedLayer) -> list[Tensor]:
        """What comes out of the layer, compressed; (B, T, H) per batch."""
        calls = [calls[self.number] for calls in self.recording.calls]
        with torch.no_grad(), in_place(layer, family, made):
            return [call.run(layer, own(hidden)) for call, hidden in zip(calls, self.hidden, strict=True)]


@contextmanager
def in_place(layer: nn.Module, family: Family, made: CompressedLayer) -> Iterator[None]:
    """Have a layer of the base use its compressed matrices, for the time of a block."""
    narrow = (*family.reads, family.writes) if made.shape.channels is not None else ()
    before = {path: layer.get_submodule(path) for path in (*made.shape.ranks, *narrow)}
    try:
        with torch.device("meta"):
            reshape(layer, family, made.shape)
        for path in before:
            state = {n.removeprefix(f"{path}."): t for n, t in made.tensors.items() if n.startswith(f"{path}.")}
            layer.get_submodule(path).load_state_dict(state, assign=True)
        yield
    finally:
        for path, module in before.items():
            layer.set_submodule(path, module)


def distil(layer: nn.Module, family: Family, made: CompressedLayer, prefix: Prefix, steps: int) -> CompressedLayer:
    """Train what is compressed of a layer of the base to put out what that does, by steps of Adam on one batch each.

    Returns:
        The layer after them, or `made` itself where nothing is compressed, or nothing got better.
    """
    names, targets = _learning(made, family), prefix.recording.hidden.get(prefix.number + 1)
    if not names:
        return made
    with in_place(layer, family, made):
        weights = {name: layer.get_parameter(name) for name in names}
        with trainable_only(layer, weights.values()):
            before = _error(layer, prefix, targets)
            learned = _learn(layer, weights, prefix, targets, steps)
            after = _error(layer, prefix, targets)
    if not after < before:
        return made
    return replace(made, tensors={**made.tensors, **_plain(learned, made)})


def _learning(made: CompressedLayer, family: Family) -> list[str]:
    """Names of the weights that learn."""
    factors = [f"{path}.{side}.weight" for path in made.shape.ranks for side in ("down", "up")]
    return factors if made.shape.channels is None else [*factors, f"{family.writes}.weight"]


def _learn(
    layer: nn.Module, weights: dict[str, nn.Parameter], prefix: Prefix, targets: Sequence[Tensor], steps: int
) -> dict[str, Tensor]:
    """The weights after the steps; in float32, or float64 where they are, since half precision loses small steps."""
    wide = {name: widened(weight.detach()).clone() for name, weight in weights.items()}
    groups = [{"params": [one], "lr": RATE * float(one.square().mean().sqrt())} for one in wide.values()]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for batch in islice(cycle(range(len(targets))), steps):
        with torch.enable_grad():
            error = _batch_error(layer, prefix, targets, batch).mean()
        grads = torch.autograd.grad(error, list(weights.values()))
        for one, grad in zip(wide.values(), grads, strict=True):
            one.grad = grad.to(one)
        optimizer.step()
        schedule.step()
        for name, weight in weights.items():
            weight.data = wide[name].to(weight.dtype)  # not into the tensor that is there, which is the layer's
    return wide


def _error(layer: nn.Module, prefix: Prefix, targets: Sequence[Tensor]) -> float:
    """The error over all rows."""
    with torch.no_grad():
        return float(torch.cat([_batch_error(layer, prefix, targets, batch) for batch in range(len(targets))]).mean())


def _batch_error(layer: nn.Module, prefix: Prefix, targets: Sequence[Tensor], batch: int) -> Tensor:
    """The error of every real token of a batch."""
    out_BTH = prefix.recording.calls[batch][prefix.number].run(layer, own(prefix.hidden[batch]))
    real_BT = prefix.recording.real[batch].to(out_BTH.device)
    wanted, found = (widened(x_BTH[real_BT]) for x_BTH in (targets[batch].to(out_BTH.device), out_BTH))
    error: Tensor = (found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)
    return error


def _plain(learned: dict[str, Tensor], made: CompressedLayer) -> dict[str, Tensor]:
    """Tensors as a kit has them: factors in canonical form, in the dtype that they had."""
    found = dict(learned)
    for path in made.shape.ranks:
        names = f"{path}.up.weight", f"{path}.down.weight"
        found |= dict(zip(names, canonical(*(found[name].double() for name in names)), strict=True))
    return {name: tensor.to(made.tensors[name]).contiguous() for name, tensor in found.items()}
