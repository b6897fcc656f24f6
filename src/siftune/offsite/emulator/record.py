"""Calibration rows through a model layer by layer: what goes into a layer, and the gradient of what comes out of it.

With those two a layer can be run forward and backward alone afterwards, so curvature, scores and compression need one
layer's activations at a time. So does the pass itself: all batches go through one layer before the next one, upwards
without a graph, and downwards once more layer by layer; no gradient of a weight is formed. Who replays the layers from
the last to the first has the gradients go down with that, and spares the pass. A model whose layers are loaded when
they run (`models/streamed.py`) has one of them in memory at any time.

    model --pass--> Recording --replay(layer)--> inputs x and output gradients g of each of the layer's matrices

Shapes: B rows, T positions, H hidden size, N real tokens of all batches, I and O in and out features of a matrix.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from siftune.base.errors import DataError
from siftune.base.files import Progress
from siftune.models.layers import find_layers, hidden_states
from siftune.models.loss import cross_entropy, label_positions, logits_at, next_labels
from siftune.models.modules import evaluating, trainable_only
from siftune.models.streamed import held
from siftune.offsite.emulator.recording import Call, Captured, Recording, States, Visit, own, rows_of

Batch = dict[str, Tensor]


def record(
    model: nn.Module,
    batches: Sequence[Batch],
    numbers: Sequence[int],
    progress: Progress | None = None,
    folder: Path | None = None,
    whole: bool = True,
) -> Recording:
    """Run the calibration batches through the model once, forward and backward, layer by layer.

    The model is left as it was: mode, `requires_grad` and gradients.

    Args:
        model: A causal language model without adapters; also spread over devices by accelerate.
        batches: Each with (B, T) `input_ids`, `attention_mask` and `labels` (-100 where nothing is learned).
        numbers: Numbers of the layers to record, without a gap.
        progress: Told after each layer.
        folder: Where hidden states and gradients lie; layers that are there already are not run again. None keeps them
            in memory.
        whole: Go down to the first of these layers, not only to the last of them; see `Recording`.

    Raises:
        DataError: There is no batch, or not one label in all of them, or the loss is not finite.
    """
    recording = Recording(numbers, States(folder, "hidden"), States(folder, "grad"), whole=whole)
    layers = find_layers(model).layers
    used = [batch for batch in batches if bool(label_positions(batch["labels"]).any())]
    if not used:
        raise DataError("the calibration rows hold no token to learn: give rows with text")

    def tell(done: int) -> None:
        if progress is not None:
            progress("calibration", done, 2 * len(layers) - (numbers[0] if whole else numbers[-1]))

    with trainable_only(model), evaluating(model):
        _upwards(recording, layers, _enter(model, layers, used, recording), tell)
        _downwards(recording, layers, _losses(model, layers, used, recording), tell)
    for number in range(numbers[-1] + 1, len(layers) + 1):  # above the middle nothing is needed any more
        recording.grads.drop(number)
        if number > numbers[-1] + 1:
            recording.hidden.drop(number)
    return recording


def replay(layer: nn.Module, recording: Recording, number: int, paths: Sequence[str]) -> dict[str, Captured]:
    """Run a recorded layer alone, and collect what its matrices saw, by path.

    Matrices that read the same tensor share `x_NI`. Where the recording is not whole, it then has the gradients for the
    layer below.
    """
    parts: dict[str, list[Captured]] = {path: [] for path in paths}
    shared: dict[int, Tensor] = {}
    below: list[Tensor] = []
    with trainable_only(layer), evaluating(layer), held(layer), torch.enable_grad():
        for visit in recording.visits(number):
            inputs, outputs, (*grads, entering) = _backward(layer, visit, paths)
            below.append(entering)
            shared = {id(x): rows_of(x, visit.real_BT) for x in inputs.values()}
            for path, g in zip(outputs, grads, strict=True):
                parts[path].append(Captured(shared[id(inputs[path])], rows_of(g, visit.real_BT)))
    if not recording.whole and number > recording.numbers[0]:
        recording.grads.put(number - 1, below)
    joined: dict[tuple[int, ...], Tensor] = {}
    captured = {}
    for path in paths:
        key = tuple(id(part.x_NI) for part in parts[path])
        if key not in joined:
            joined[key] = torch.cat([part.x_NI for part in parts[path]])
        captured[path] = Captured(joined[key], torch.cat([part.g_NO for part in parts.pop(path)]))
    return captured


def _enter(model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Batch], to: Recording) -> list[Tensor]:
    """What goes into the first layer; the calls of all layers go into the recording.

    Masks and positions do not depend on hidden states, so that the layers themselves need not run for that.
    """
    entering: list[Tensor] = []

    def note(number: int, hidden: Tensor, call: Call) -> Tensor:
        if number == 0:
            entering.append(own(hidden))
            to.calls.append([])
        to.calls[-1].append(call)
        return hidden

    for batch in batches:
        _logits(model, layers, batch, note)
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
    for number in range(start, depth):
        if number >= first:
            recording.hidden.put(number, states)
        calls = [calls[number] for calls in recording.calls]
        with held(layers[number]):
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
        logits_NV = _logits(model, layers, batch, end)
        targets_N = next_labels(batch["labels"]).to(logits_NV.device)
        loss = cross_entropy(logits_NV, targets_N).sum()
    return float(loss.detach()), torch.autograd.grad(loss, last_BTH)[0]


def _downwards(
    recording: Recording, layers: Sequence[nn.Module], grads: list[Tensor], tell: Callable[[int], None]
) -> None:
    """The gradient of the loss for what comes out of the layers, from the last one to the lowest that is asked for."""
    first, depth = recording.numbers[0], len(layers)
    lowest = first if recording.whole else recording.numbers[-1]
    start = min((number for number in range(first, depth) if recording.grads.has(number)), default=depth - 1)
    if recording.grads.has(start):
        grads = recording.grads.get(start)
    for number in range(start, lowest - 1, -1):
        recording.grads.put(number, grads)
        tell(2 * depth - number)
        if number > lowest:
            with held(layers[number]):
                grads = [_input_gradient(layers[number], visit) for visit in recording.visits(number)]


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
) -> Tensor:
    """Logits at the labels of a batch, (N, V), with something else in the place of every layer."""
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
    with _replaced(layers, instead), logits_at(model, label_positions(batch["labels"])):
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
