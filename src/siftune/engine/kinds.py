"""Kinds of trainable parameters, and the gradient of every row for each.

A row's gradient for the weight of a linear map is one product of its output gradients with its inputs. That of all rows
is one batched product, with as many operations as the sum over rows takes. See Goodfellow, "Efficient Per-Example
Gradient Computations" (arXiv 1510.01799).

Shapes: B rows, T positions, I inputs, O outputs, D values of a parameter. `...` stands for the positions, in any number
of dimensions. Sums run in float32, or float64 if the input is float64.
"""

from enum import Enum

import torch
from torch import Tensor, nn


def linear_weight(grad_BTO: Tensor, input_BTI: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of every row for W in y = x Wᵀ; (B, O, I), in the dtype of the output gradient."""
    return torch.bmm(grad_BTO.flatten(1, -2).transpose(1, 2), input_BTI.to(grad_BTO.dtype).flatten(1, -2), out=out)


def transposed_weight(grad_BTO: Tensor, input_BTI: Tensor, out: Tensor | None = None) -> Tensor:
    """Gradient of every row for W in y = x W, as in GPT-2's Conv1D; (B, I, O)."""
    return torch.bmm(input_BTI.to(grad_BTO.dtype).flatten(1, -2).transpose(1, 2), grad_BTO.flatten(1, -2), out=out)


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


class Kind(Enum):
    """Use of a parameter, which determines how a row's gradient is formed."""

    LINEAR = "weight of a linear map"
    TRANSPOSED = "weight of a Conv1D"
    BIAS = "added to the output"
    NORM = "weight of a LayerNorm"
    SCALE = "scales activations"
    FLATTENED = "scales activations, flattened by PEFT"

    @property
    def is_vector(self) -> bool:
        """Whether the parameter is expanded to one copy per row; else a tap on its module forms its gradients."""
        return self in (Kind.SCALE, Kind.FLATTENED)

    def gradient(self, owner: nn.Module, grad_BTO: Tensor, input_BTI: Tensor, out: Tensor | None = None) -> Tensor:
        """Gradient of every row from the owner's output gradient and its input; (B, …); that of matrices in `out`."""
        if self is Kind.LINEAR:
            return linear_weight(grad_BTO, input_BTI, out)
        if self is Kind.TRANSPOSED:
            return transposed_weight(grad_BTO, input_BTI, out)
        if self is Kind.NORM:
            return norm_weight(grad_BTO, input_BTI, float(owner.eps))  # type: ignore[arg-type]
        return added_bias(grad_BTO)
