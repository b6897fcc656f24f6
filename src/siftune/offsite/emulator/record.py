"""One pass over calibration rows: what goes into every middle layer, and the gradient of what comes out.

With those two a layer can be run forward and backward alone afterwards, so curvature, scores and compression need one
layer's activations at a time. The pass itself is an ordinary forward and backward over a batch; no gradient of a weight
is formed.

    model --pass--> Recording --replay(layer)--> inputs x and output gradients g of each of the layer's matrices

Shapes: B rows, T positions, H hidden size, N real tokens of all batches, I and O in and out features of a matrix.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from siftune.errors import DataError
from siftune.files import Progress
from siftune.models.layers import find_layers, hidden_states, with_hidden
from siftune.models.loss import label_positions, logits_at, next_labels
from siftune.models.modes import evaluating, trainable_only


@dataclass
class Visit:
    """One batch's visit to one layer: the call, and the gradient that came back; hidden states wait on the CPU."""

    args: tuple[Any, ...]  # hidden states apart
    kwargs: dict[str, Any]
    hidden_BTH: Tensor
    grad_BTH: Tensor | None = None


@dataclass
class Recording:
    """What the middle layers saw.

    Attributes:
        visits: By number of the layer, one visit per batch.
        real: (B, T) bool per batch: false on padding.
        tokens: Labels of all batches.
        loss: Mean loss per label.
        effect: By number of the layer: the sum over tokens of ⟨∂ℓ/∂y, y − x⟩², x and y the layer's input and output.
            Its root is, to first order, by how much the loss of a token would move if the layer were skipped.
        last_BTH: Outputs of the last of these layers, one per batch.
    """

    visits: dict[int, list[Visit]]
    real: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    loss: float = 0.0
    effect: dict[int, float] = field(default_factory=dict)
    last_BTH: list[Tensor] = field(default_factory=list)

    def outputs(self, number: int) -> Tensor:
        """Outputs of a layer at the real tokens of all batches; (N, H) float32."""
        following = self.visits.get(number + 1)
        outputs = [visit.hidden_BTH for visit in following] if following is not None else self.last_BTH
        return torch.cat([_rows(h, real) for h, real in zip(outputs, self.real, strict=True)])


@dataclass(frozen=True)
class Captured:
    """What one matrix saw: float32, where the layer is; padding is left out.

    Attributes:
        x_NI: Its inputs.
        g_NO: Gradients of the summed loss for its outputs.
    """

    x_NI: Tensor
    g_NO: Tensor


def record(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    numbers: Sequence[int],
    store: torch.dtype | None = torch.bfloat16,
    progress: Progress | None = None,
) -> Recording:
    """Run the calibration batches through the model once, forward and backward.

    The model is left as it was: mode, `requires_grad` and gradients.

    Args:
        model: A causal language model without adapters; also spread over devices by accelerate.
        batches: Each with (B, T) `input_ids`, `attention_mask` and `labels` (-100 where nothing is learned).
        numbers: Numbers of the layers to record, without a gap.
        store: Dtype in which hidden states and gradients are kept; None keeps the model's.
        progress: Told after each batch.

    Raises:
        DataError: There is no batch, or not one label in all of them, or the loss is not finite.
    """
    recording = Recording({number: [] for number in numbers}, effect=dict.fromkeys(numbers, 0.0))
    layers = find_layers(model).layers
    with ExitStack() as undo:
        undo.enter_context(trainable_only(model))
        undo.enter_context(evaluating(model))
        undo.enter_context(torch.enable_grad())
        for number in numbers:
            first = number == numbers[0]
            before = partial(_arrive, recording, number, first, store)
            undo.callback(layers[number].register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(layers[number].register_forward_hook(partial(_leave, recording, number)).remove)
        for done, batch in enumerate(batches, 1):
            _run(model, batch, recording)
            if progress is not None:
                progress("calibration", done, len(batches))
    return _checked(recording)


def replay(layer: nn.Module, recording: Recording, number: int, paths: Sequence[str]) -> dict[str, Captured]:
    """Run a recorded layer alone, and collect what its matrices saw.

    Matrices that read the same tensor share `x_NI`.

    Args:
        layer: The layer.
        recording: From `record`.
        number: Its number.
        paths: Its matrices.
    """
    parts: dict[str, list[Captured]] = {path: [] for path in paths}
    shared: dict[int, Tensor] = {}
    with trainable_only(layer), torch.enable_grad():
        for visit, real in zip(recording.visits[number], recording.real, strict=True):
            inputs, outputs, grads = _backward(layer, visit, paths)
            shared = {id(x): _rows(x, real) for x in inputs.values()}
            for path, g in zip(outputs, grads, strict=True):
                parts[path].append(Captured(shared[id(inputs[path])], _rows(g, real)))
    joined: dict[tuple[int, ...], Tensor] = {}
    captured = {}
    for path in paths:
        key = tuple(id(part.x_NI) for part in parts[path])
        if key not in joined:
            joined[key] = torch.cat([part.x_NI for part in parts[path]])
        captured[path] = Captured(joined[key], torch.cat([part.g_NO for part in parts[path]]))
    return captured


def _arrive(
    recording: Recording,
    number: int,
    first: bool,
    store: torch.dtype | None,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Before a layer: keep the call; the first one cuts the graph, so that backward ends there."""
    hidden = hidden_states(args, kwargs)
    copy_BTH = hidden.detach().to("cpu", store or hidden.dtype)
    if copy_BTH.data_ptr() == hidden.data_ptr():
        copy_BTH = copy_BTH.clone()  # the model may go on in place
    rest = args[1:] if args and isinstance(args[0], Tensor) else args
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    recording.visits[number].append(Visit(rest, others, copy_BTH))
    return with_hidden(args, kwargs, lambda h: h.detach().requires_grad_()) if first else None


def _leave(recording: Recording, number: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """After a layer: have the gradient of its output kept when backward gets there."""
    visit, place = recording.visits[number][-1], len(recording.real) - 1
    if number == max(recording.visits):
        recording.last_BTH.append(_tensor(output).detach().to("cpu", visit.hidden_BTH.dtype, copy=True))

    def keep(grad: Tensor) -> None:
        visit.grad_BTH = grad.detach().to("cpu", visit.hidden_BTH.dtype, copy=True)
        change = (out.detach() - visit.hidden_BTH.to(out.device)).float()
        real = recording.real[place].to(out.device)
        recording.effect[number] += float(((grad.float() * change).sum(-1) ** 2)[real].sum())

    out = _tensor(output)
    out.register_hook(keep)  # type: ignore[no-untyped-call]


def _run(model: nn.Module, batch: dict[str, Tensor], recording: Recording) -> None:
    """Forward and backward of the summed loss over one batch."""
    labels_BT = batch["labels"]
    mask_BT = label_positions(labels_BT)
    real = batch.get("attention_mask", torch.ones_like(labels_BT)).bool()
    if not bool(mask_BT.any()):
        return
    recording.real.append(real.cpu())
    device = next(model.parameters()).device
    device = torch.device("cpu") if device.type == "meta" else device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
    with logits_at(model, mask_BT):
        logits_NV = model(**inputs, use_cache=False).logits[0]
    targets_N = next_labels(labels_BT).to(logits_NV.device)
    loss = nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    total = recording.loss * recording.tokens + float(loss.detach())
    recording.tokens += targets_N.numel()
    recording.loss = total / recording.tokens


def _checked(recording: Recording) -> Recording:
    if not recording.tokens:
        raise DataError("the calibration rows hold no token to learn: give rows with text")
    if not torch.isfinite(torch.tensor(recording.loss)):
        raise DataError(
            f"the loss on the calibration rows is {recording.loss}: nothing can be learned from it about the model; "
            "give other rows, or load the model with --dtype float32"
        )
    return recording


def _backward(
    layer: nn.Module, visit: Visit, paths: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Sequence[Tensor]]:
    """Inputs and outputs of a layer's matrices in one visit, and the gradients of the outputs."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(path: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[path], outputs[path] = args[0], output

    like = next(p for p in layer.parameters())
    dtype = like.dtype
    device = visit.hidden_BTH.device if like.device.type == "meta" else like.device
    hidden = visit.hidden_BTH.to(device, dtype).requires_grad_()
    with ExitStack() as undo:
        for path in paths:
            undo.callback(layer.get_submodule(path).register_forward_hook(partial(keep, path)).remove)
        out = _tensor(layer(hidden, *visit.args, **visit.kwargs))
    assert visit.grad_BTH is not None
    grads = torch.autograd.grad(out, list(outputs.values()), visit.grad_BTH.to(out.device, out.dtype))
    return inputs, outputs, grads


def _rows(x_BTF: Tensor, real_BT: Tensor) -> Tensor:
    """Real tokens of a (B, T, F) tensor as float32 rows (N, F); OPT hands its MLP rows that are flat already."""
    flat = x_BTF.detach().reshape(-1, x_BTF.shape[-1])
    return flat[real_BT.flatten().to(flat.device)].float()


def _tensor(output: Any) -> Tensor:
    """The hidden states in a decoder layer's output."""
    return output if isinstance(output, Tensor) else output[0]
