"""Calibration: the input of every layer on the calibration rows, and the gradient of its output.

With those two a layer can be run forward and backward alone afterwards, so that curvature, scores and compression need
one layer's activations at a time. The pass works the same way: all batches go through one layer before the next one,
upwards without a graph, and downwards to the last middle layer; no gradient of a weight is formed. Each replay
computes the gradients for the layer below, so layers are best replayed from the last to the first.

    model --pass--> Recording --replay(layer)--> inputs x and output gradients g of each of the layer's matrices,
                                                 batch by batch

Shapes: B rows, T positions, H hidden size, N real tokens of all batches, F features, I and O in and out features.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from siftune.base.errors import DataError
from siftune.base.files import Progress, write_beside
from siftune.models.layers import hidden_states
from siftune.models.loss import cross_entropy, label_positions, logits_at, next_labels
from siftune.models.modules import evaluating, trainable_only
from siftune.offsite.emulator.model import Base


class States:
    """Tensors by number of the layer, one per batch or by name, on the CPU.

    Args:
        folder: Where they lie, one file per layer, there whole or not at all; None keeps them in memory.
        name: Start of the files' names.
    """

    def __init__(self, folder: Path | None = None, name: str = "") -> None:
        self._folder, self._name = folder, name
        self._here: dict[int, dict[str, Tensor]] = {}

    def beside(self, name: str) -> "States":
        """Others of another name, kept as these are."""
        return States(self._folder, name)

    def put(self, number: int, batches: Sequence[Tensor]) -> None:
        """Keep a layer's tensors."""
        self.put_named(number, {str(place): tensor for place, tensor in enumerate(batches)})

    def put_named(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a layer's tensors by name."""
        plain = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        if self._folder is None:
            self._here[number] = plain
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with write_beside(self._file(self._folder, number)) as [beside]:
            save_file({name: tensor.contiguous() for name, tensor in plain.items()}, beside)

    def get(self, number: int) -> list[Tensor]:
        """A layer's tensors, not to be changed in place; those of a folder are read as they are used."""
        batches = self.get_named(number)
        return [batches[str(place)] for place in range(len(batches))]

    def get_named(self, number: int) -> dict[str, Tensor]:
        """A layer's tensors by name, otherwise as `get`."""
        return self._here[number] if self._folder is None else load_file(self._file(self._folder, number))

    def has(self, number: int) -> bool:
        """Whether a layer's tensors are there."""
        return number in self._here if self._folder is None else self._file(self._folder, number).exists()

    def drop(self, number: int) -> None:
        """Free memory; files in a folder stay, for a run that may continue."""
        self._here.pop(number, None)

    def _file(self, folder: Path, number: int) -> Path:
        return folder / f"{self._name}-{number:04d}.safetensors"


@dataclass(frozen=True)
class Call:
    """Arguments of a layer besides the hidden states: masks, positions and others; tensors are on the CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, layer: nn.Module, hidden_BTH: Tensor) -> Tensor:
        """Run a layer so; (B, T, H)."""
        device = next(layer.parameters()).device
        hidden_BTH, args, kwargs = send_to_device((hidden_BTH, self.args, self.kwargs), device)
        output: Tensor = layer(hidden_BTH, *args, **kwargs)
        return output


@dataclass(frozen=True)
class Visit:
    """One batch's visit to one layer."""

    call: Call
    hidden_BTH: Tensor  # what went in
    grad_BTH: Tensor  # gradient of the summed loss for what came out
    real_BT: Tensor  # bool; false on padding


@dataclass
class Recording:
    """Inputs and output gradients of the middle layers, in the model's dtype."""

    numbers: Sequence[int]  # numbers of these layers
    hidden: States  # what goes into a layer, by its number
    grads: States  # gradients of the summed loss for what comes out; a `replay` adds those of the layer below
    curvature: States  # of the layers' matrices, where it is kept (`curvature.py`)

    # what layers' matrices would cost, by what that depends on
    measured: dict[Hashable, States] = field(default_factory=dict)
    calls: list[list[Call]] = field(default_factory=list)  # by batch, then by number of the layer
    real: list[Tensor] = field(default_factory=list)  # (B, T) bool per batch: false on padding
    tokens: int = 0  # labels of all batches
    loss: float = 0.0  # mean loss per label

    @property
    def positions(self) -> int:
        """N, real tokens of all batches."""
        return sum(int(real_BT.sum()) for real_BT in self.real)

    def visits(self, number: int) -> Iterator[Visit]:
        """The visits to a layer, one per batch."""
        calls = [calls[number] for calls in self.calls]
        for parts in zip(calls, self.hidden.get(number), self.grads.get(number), self.real, strict=True):
            yield Visit(*parts)

    def costs(self, of: Hashable) -> States:
        """Measured costs of layers, by number; jobs with the same `of` share them."""
        return self.measured.setdefault(of, self.hidden.beside("cost"))

    def forget(self, number: int) -> None:
        """Free the memory of a layer that is done with."""
        for states in (self.hidden, self.grads, self.curvature):
            states.drop(number)


@dataclass(frozen=True)
class Captured:
    """Inputs and output gradients of one matrix: float32, on the layer's device, without padding."""

    x_NI: Tensor  # inputs
    g_NO: Tensor  # gradients of the summed loss for its outputs


def rows_of(x_BTF: Tensor, real_BT: Tensor) -> Tensor:
    """Real tokens of a (B, T, F) tensor as float32 rows (N, F); OPT hands its MLP rows that are flat already."""
    flat = x_BTF.detach().reshape(-1, x_BTF.shape[-1])
    return flat[real_BT.flatten().to(flat.device)].float()


def own(hidden: Tensor) -> Tensor:
    """A copy that a layer may change in place."""
    return hidden.detach().clone()


Batch = dict[str, Tensor]


def record(
    base: Base,
    batches: Sequence[Batch],
    progress: Progress | None = None,
    folder: Path | None = None,
) -> Recording:
    """Run the calibration batches through the model once, forward and backward, layer by layer.

    The model is left as it was: mode, `requires_grad` and gradients.

    Args:
        base: The base model; also spread over devices by accelerate.
        batches: Each with (B, T) `input_ids`, `attention_mask` and `labels` (-100 where nothing is learned).
        progress: Told after each layer.
        folder: Where hidden states and gradients lie; layers that are there already are not run again. None keeps them
            in memory.

    Raises:
        DataError: There is no batch, or not one label in all of them, or the loss is not finite.
    """
    model, layers, numbers = base.model, base.layers, base.middle
    hidden, grads, curvature = (States(folder, name) for name in ("hidden", "grad", "curvature"))
    recording = Recording(numbers, hidden, grads, curvature)
    used = [batch for batch in batches if bool(label_positions(batch["labels"]).any())]
    if not used:
        raise DataError("the calibration rows hold no token to learn: give rows with text")

    def tell(done: int) -> None:
        if progress is not None:
            progress("calibration", done, 2 * len(layers) - numbers[-1])

    with trainable_only(model), evaluating(model):
        _upwards(recording, layers, _enter(model, layers, used, recording), tell)
        _downwards(recording, layers, _losses(model, layers, used, recording), tell)
    for number in range(numbers[-1] + 1, len(layers) + 1):  # above the middle nothing is needed any more
        recording.forget(number)
    return recording


def replay(
    base: Base, recording: Recording, number: int, paths: Sequence[str], take: Callable[[dict[str, Captured]], None]
) -> None:
    """Run a recorded layer alone, batch by batch.

    If the layer above was not replayed before, gradients come down to this layer first.

    Args:
        base: The base model.
        recording: Of its layers.
        number: Number of the layer.
        paths: Of the layer's matrices.
        take: Receives what the matrices saw in a batch, by path; matrices that read the same tensor share `x_NI`.
    """
    _descend(base.layers, recording, number)
    layer = base.layers[number]
    below: list[Tensor] = []
    with trainable_only(layer), evaluating(layer), torch.enable_grad():
        for visit in recording.visits(number):
            inputs, outputs, (*grads, entering) = _backward(layer, visit, paths)
            below.append(entering)
            shared = {id(x): rows_of(x, visit.real_BT) for x in inputs.values()}
            gradients = zip(outputs, grads, strict=True)
            take({path: Captured(shared[id(inputs[path])], rows_of(g, visit.real_BT)) for path, g in gradients})
    if number > recording.numbers[0] and not recording.grads.has(number - 1):
        recording.grads.put(number - 1, below)


def _enter(model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Batch], to: Recording) -> list[Tensor]:
    """The input of the first layer; the calls of all layers go into the recording.

    Masks and positions do not depend on hidden states, so that the layers themselves need not run for that.
    """
    entering: list[Tensor] = []
    there: dict[int, tuple[Tensor, Tensor]] = {}  # of a batch: a mask is moved once for all layers

    def moved(tensor: Tensor) -> Tensor:
        return there.setdefault(id(tensor), (tensor, tensor.cpu()))[1]  # the tensor too, so that its id stays its own

    def note(number: int, hidden: Tensor, call: Call) -> Tensor:
        if number == 0:
            entering.append(own(hidden))
            to.calls.append([])
            there.clear()
        to.calls[-1].append(Call(*recursively_apply(moved, (call.args, call.kwargs))))
        return hidden

    for batch in batches:
        nowhere_BT = torch.zeros_like(batch["labels"], dtype=torch.bool)  # no logits are needed
        _logits(model, layers, batch, note, nowhere_BT)
        to.real.append(batch.get("attention_mask", torch.ones_like(batch["labels"])).bool().cpu())
    return entering


def _upwards(
    recording: Recording, layers: Sequence[nn.Module], states: list[Tensor], tell: Callable[[int], None]
) -> None:
    """All batches through one layer after the other; what goes into the middle layers and those above is kept."""
    first, depth = recording.numbers[0], len(layers)
    start = max((number for number in range(first, depth + 1) if recording.hidden.has(number)), default=0)
    if recording.hidden.has(start):
        states = recording.hidden.get(start)
    if start < depth:
        tell(start)
    for number in range(start, depth):
        if number >= first:
            recording.hidden.put(number, states)
        calls = [calls[number] for calls in recording.calls]
        states = [call.run(layers[number], own(hidden)) for call, hidden in zip(calls, states, strict=True)]
        tell(number + 1)
    recording.hidden.put(depth, states)


def _losses(
    model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Batch], recording: Recording
) -> list[Tensor]:
    """The loss of every batch, and its gradient for what comes out of the last layer.

    Raises:
        DataError: The loss is not finite.
    """
    total, grads = 0.0, []
    for batch, hidden in zip(batches, recording.hidden.get(len(layers)), strict=True):
        loss, grad = _loss(model, layers, batch, own(hidden).requires_grad_())
        grads.append(grad)
        total += loss
    recording.tokens = sum(int(label_positions(batch["labels"]).sum()) for batch in batches)
    recording.loss = total / recording.tokens
    if not math.isfinite(recording.loss):
        raise DataError(
            f"the loss on the calibration rows is {recording.loss}: nothing can be learned from it about the model; "
            "give other rows, or load the model with --dtype float32"
        )
    return grads


def _loss(model: nn.Module, layers: Sequence[nn.Module], batch: Batch, last_BTH: Tensor) -> tuple[float, Tensor]:
    """The summed loss of a batch, and its gradient for what comes out of the last layer."""

    def end(number: int, hidden: Tensor, _: Call) -> Tensor:
        return last_BTH.to(hidden.device) if number == len(layers) - 1 else hidden

    with torch.enable_grad():
        logits_NV = _logits(model, layers, batch, end, label_positions(batch["labels"]))
        targets_N = next_labels(batch["labels"]).to(logits_NV.device)
        loss = cross_entropy(logits_NV, targets_N).sum()
    return float(loss.detach()), torch.autograd.grad(loss, last_BTH)[0]


def _downwards(
    recording: Recording, layers: Sequence[nn.Module], grads: list[Tensor], tell: Callable[[int], None]
) -> None:
    """The gradient of the loss for what comes out of the layers, from the last one to the last of the middle."""
    if not any(recording.grads.has(number) for number in range(recording.numbers[0], len(layers))):
        recording.grads.put(len(layers) - 1, grads)
        tell(len(layers) + 1)
    _descend(layers, recording, recording.numbers[-1], tell)


def _descend(
    layers: Sequence[nn.Module], recording: Recording, to: int, tell: Callable[[int], None] = lambda _: None
) -> None:
    """Gradients for what comes out of a layer, from those of the next layer above that has them."""
    start = next((number for number in range(to, len(layers)) if recording.grads.has(number)), to)
    for number in range(start, to, -1):
        layer = layers[number]
        with trainable_only(layer), evaluating(layer):
            grads = [_input_gradient(layer, visit) for visit in recording.visits(number)]
        recording.grads.put(number - 1, grads)
        tell(2 * len(layers) - number + 1)


def _input_gradient(layer: nn.Module, visit: Visit) -> Tensor:
    """The gradient for what goes into a layer, from that for what comes out."""
    hidden = own(visit.hidden_BTH).requires_grad_()
    with torch.enable_grad():
        out = visit.call.run(layer, hidden)
    return torch.autograd.grad(out, hidden, visit.grad_BTH.to(out.device))[0]


def _logits(
    model: nn.Module,
    layers: Sequence[nn.Module],
    batch: Batch,
    instead: Callable[[int, Tensor, Call], Tensor],
    at_BT: Tensor,
) -> Tensor:
    """Logits at some positions of a batch, (N, V), with something else in the place of every layer."""
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
    with _replaced(layers, instead), logits_at(model, at_BT):
        logits: Tensor = model(**inputs, use_cache=False).logits[0]
    return logits


@contextmanager
def _replaced(layers: Sequence[nn.Module], instead: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
    """Have something else computed in the place of layers, whose weights are not touched."""

    def forward(number: int, *args: Any, **kwargs: Any) -> Tensor:
        rest = args[1:] if args and isinstance(args[0], Tensor) else args
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return instead(number, hidden_states(args, kwargs), Call(rest, others))

    before = [vars(layer).get("forward") for layer in layers]  # accelerate leaves one of its own there
    try:
        for number, layer in enumerate(layers):
            layer.forward = partial(forward, number)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = own


def _backward(
    layer: nn.Module, visit: Visit, paths: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Sequence[Tensor]]:
    """Inputs and outputs of a layer's matrices in one visit; gradients of the outputs, and last of what goes in."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(path: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[path], outputs[path] = args[0], output

    hidden = own(visit.hidden_BTH).requires_grad_()
    with ExitStack() as undo:
        for path in paths:
            undo.callback(layer.get_submodule(path).register_forward_hook(partial(keep, path)).remove)
        out = visit.call.run(layer, hidden)
    grads = torch.autograd.grad(out, [*outputs.values(), hidden], visit.grad_BTH.to(out.device))
    return inputs, outputs, grads
