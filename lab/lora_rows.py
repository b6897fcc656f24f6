"""What the baselines need of a model: its LoRA matrices, and the gradients of rows in a pass over it.

Shapes: B rows, T positions, I inputs, O outputs, K chosen rows, N = K·T.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from siftune.base.errors import UnsupportedError
from siftune.engine.groups import group_by_layer, outside

Read = Callable[[nn.Linear, Tensor, Tensor], Tensor | None]  # matrix, output's gradient, input -> weight's gradient


class ReadLinear(torch.autograd.Function):
    """y = x Wᵀ, where `read` says what the weight's gradient is; the input gets its own, of all rows."""

    @staticmethod
    def forward(ctx: Any, read: Callable[[Tensor, Tensor], Tensor | None], given: Tensor, weight: Tensor) -> Tensor:
        """Multiply; `read(output's gradient, input)` is called in backward."""
        ctx.read = read
        ctx.save_for_backward(given, weight)
        return nn.functional.linear(given, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        """Pass the gradient on to the input, and return what was read for the weight."""
        given, weight = ctx.saved_tensors
        to_input = (grads[0] @ weight.to(grads[0].dtype)).to(given.dtype) if ctx.needs_input_grad[1] else None
        return None, to_input, ctx.read(grads[0], given)


@contextmanager
def reading(matrices: Sequence[nn.Linear], ids_BT: Tensor, read: Read) -> Iterator[None]:
    """Have `read` form the gradients of LoRA matrices in one forward and backward pass over some rows.

    Args:
        matrices: The matrices; each has to be used once.
        ids_BT: The rows' token numbers.
        read: Given a matrix, the gradient (B, T, O) of its output, and its input (B, T, I).

    Raises:
        UnsupportedError: A matrix does not see the rows one by one, or is used never or more than once.
    """
    calls: list[nn.Linear] = []
    rows, positions = ids_BT.shape

    def forward(matrix: nn.Linear, given: Tensor) -> Tensor:
        if torch.is_grad_enabled() and given.shape[:-1] not in ((rows, positions), (rows * positions,)):
            raise UnsupportedError(
                f"a LoRA matrix works on a tensor of shape {tuple(given.shape)} in a batch of {rows} rows and "
                f"{positions} positions, so the rows' gradients cannot be told apart"
            )
        return ReadLinear.apply(partial(note, matrix), given, matrix.weight)

    def note(matrix: nn.Linear, grad: Tensor, given: Tensor) -> Tensor | None:
        calls.append(matrix)
        return read(matrix, grad.reshape(rows, positions, -1), given.reshape(rows, positions, -1))

    try:
        for matrix in matrices:
            matrix.forward = partial(forward, matrix)
        yield
    finally:
        for matrix in matrices:
            vars(matrix).pop("forward", None)
    if sorted(map(id, calls)) != sorted(map(id, matrices)):
        raise UnsupportedError(
            f"backward came by {len(calls)} uses of {len(matrices)} LoRA matrices; every matrix has to be used once"
        )


@contextmanager
def randomness_kept(model: nn.Module) -> Iterator[None]:
    """Leave the global generators as they were, so that a second pass has the same dropout."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def gradient_of_chosen(
    rows_of: dict[nn.Linear, tuple[Tensor, Tensor]], matrix: nn.Linear, grad_BTO: Tensor, input_BTI: Tensor
) -> Tensor:
    """Gradient of a weight from some rows.

    Args:
        rows_of: matrix -> its rows (K,), and a factor on the sum over them.
        matrix: The matrix.
        grad_BTO: Gradient of its output.
        input_BTI: Its input.
    """
    rows_K, factor = rows_of[matrix]
    grad_NO, input_NI = grad_BTO[rows_K].flatten(0, 1), input_BTI[rows_K].flatten(0, 1)
    return grad_NO.T @ input_NI.to(grad_NO.dtype) * factor.to(grad_NO.dtype)


def lora_matrices(model: nn.Module) -> list[list[nn.Linear]]:
    """The LoRA matrices of every layer that has some, as the modules that multiply with them.

    Raises:
        UnsupportedError: Something else trains.
    """
    layers = []
    groups = group_by_layer(model)
    for group in groups:
        found = [
            matrix
            for module in group.module.modules()
            if isinstance(module, LoraLayer)
            and not isinstance(module, ParamWrapper | MultiheadAttention)
            and not getattr(module, "lora_variant", {})
            for matrix in (*module.lora_A.values(), *module.lora_B.values())
            if type(matrix) is nn.Linear and matrix.weight.requires_grad
        ]
        known = {id(matrix.weight) for matrix in found}
        _refuse_others([f"{group.name}.{name}" for name, p in group.parameters.items() if id(p) not in known])
        layers.append(found)
    _refuse_others(list(outside(model, groups)))
    return layers


def _refuse_others(names: Sequence[str]) -> None:
    if names:
        raise UnsupportedError(
            f"{names[0]} trains ({len(names)} such parameters), but the baselines know plain LoRA on linear modules in "
            "the decoder layers only; attach such an adapter, or use siftune's GAST"
        )
