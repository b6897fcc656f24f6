"""Gradients of single rows, and inner products between them: pure algebra.

A row's gradient for the weight of a linear map is one product of its output gradients with its inputs, so that of all
rows is one batched product, with as many operations as the sum over rows takes. See Goodfellow, "Efficient
Per-Example Gradient Computations" (arXiv 1510.01799).

Shapes: B rows, T positions, I inputs, O outputs, D values of a parameter, P values of all parameters of a unit.
`...` stands for the positions, in any number of dimensions. Sums run in float32, or float64 where the input is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from siftune.numerics import wide_dtype, widened


def linear_weight(grad_BTO: Tensor, input_BTI: Tensor) -> Tensor:
    """Gradient of every row for W in y = x Wᵀ; (B, O, I), in the dtype of the output gradient."""
    return torch.bmm(grad_BTO.flatten(1, -2).transpose(1, 2), input_BTI.to(grad_BTO.dtype).flatten(1, -2))


def transposed_weight(grad_BTO: Tensor, input_BTI: Tensor) -> Tensor:
    """Gradient of every row for W in y = x W, as GPT-2's Conv1D has it; (B, I, O)."""
    return torch.bmm(input_BTI.to(grad_BTO.dtype).flatten(1, -2).transpose(1, 2), grad_BTO.flatten(1, -2))


def added_bias(grad_BTO: Tensor) -> Tensor:
    """Gradient of every row for a bias; (B, O)."""
    return _over_positions(grad_BTO)


def norm_weight(grad_BTO: Tensor, input_BTO: Tensor, eps: float) -> Tensor:
    """Gradient of every row for the weight of a LayerNorm over the last dimension; (B, O)."""
    normed_BTO = nn.functional.layer_norm(input_BTO, input_BTO.shape[-1:], eps=eps)
    return _over_positions(grad_BTO * normed_BTO)


def _over_positions(values_BTO: Tensor) -> Tensor:
    return values_BTO.flatten(1, -2).sum(1) if values_BTO.ndim > 2 else values_BTO


def over_pairs(grads_BD: Tensor) -> Tensor:
    """Add the gradients of row i and row i + B/2: the two halves of sample i; (B/2, …)."""
    first, second = grads_BD.chunk(2)
    return first + second


def total(grads_BD: Tensor) -> Tensor:
    """Sum over the rows; (D,)."""
    return grads_BD.flatten(1).sum(0, dtype=wide_dtype(grads_BD))


def products(grads_BD: Tensor, other_D: Tensor) -> Tensor:
    """Inner product of every row's gradient with one vector; (B,)."""
    return widened(grads_BD).flatten(1) @ other_D.flatten().to(wide_dtype(grads_BD))


def squares(grads_BD: Tensor) -> Tensor:
    """Squared length of every row's gradient; (B,)."""
    lengths_B: Tensor = torch.linalg.vector_norm(grads_BD.flatten(1), dim=1, dtype=wide_dtype(grads_BD))
    return lengths_B.square()


def sum_of(grads_BD: Tensor, rows_K: Tensor) -> Tensor:
    """Sum of the gradients of some rows, as often as they are named; the shape of the parameter."""
    return grads_BD.index_select(0, rows_K).sum(0, dtype=wide_dtype(grads_BD))


def added(parts: Sequence[Tensor]) -> Tensor:
    """Add up what the parameters of a unit contribute; (B,)."""
    return torch.stack(list(parts)).sum(0)
