"""Numerics that several subjects share: the dtype that sums run in, algebra of samples' gradients, one draw.

Shapes: B samples, D values of a parameter. Sums run in float32, or float64 where the input is.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

_LEAST_UNIFORM = 1e-300  # log 0 is −∞: a uniform number of exactly 0 would give a Gumbel of −∞ and tie with others


def widened(values: Tensor) -> Tensor:
    """The same values in the dtype that sums run in."""
    return values.to(wide_dtype(values))


def wide_dtype(values: Tensor) -> torch.dtype:
    """The dtype that sums over values run in: float64 for float64, float32 for all others."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def gumbel_top_k(log_weights: Tensor, uniform: Tensor, count: int) -> Tensor:
    """Draw one after the other, without replacement, with probability ∝ the weights that are left.

    The `count` largest of log w + Gumbel noise are such a draw (Kool et al., "Stochastic Beams and Where to Find
    Them", arXiv 1903.06059). Working on logarithms, weights far apart do not underflow.

    Args:
        log_weights: (N,) logarithms of the weights, up to a constant.
        uniform: (N,) float64 uniform numbers in [0, 1), the only source of chance.
        count: How many to draw, 1 ≤ count ≤ N.

    Returns:
        (count,) int64 indices, ascending.

    Example:
        >>> log_weights = torch.tensor([0.0, -torch.inf, 0.0], dtype=torch.float64)
        >>> gumbel_top_k(log_weights, torch.full((3,), 0.5, dtype=torch.float64), 2)
        tensor([0, 2])
    """
    gumbel = -torch.log(-torch.log(uniform.clamp_min(_LEAST_UNIFORM)))
    return (log_weights + gumbel).topk(count).indices.sort().values


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


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of the gradients of some parameters together; a float32 or float64 scalar, 0 without gradients."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(grad, dtype=wide_dtype(grad)) for grad in grads]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return whole


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no value is infinite or no number; the tensors may be on several devices."""
    return bool(torch.isfinite(side_by_side(torch._foreach_norm(list(tensors)))).all())


def side_by_side(numbers: Sequence[Tensor]) -> Tensor:
    """Put numbers that may be on several devices into one tensor, on the first one's; (N,)."""
    return torch.stack([number.to(numbers[0].device) for number in numbers])


def sum_of(grads_BD: Tensor, rows: Tensor) -> Tensor:
    """Sum of the gradients of some rows; the shape of the parameter.

    Args:
        grads_BD: The rows' gradients.
        rows: (K,) int64, numbers of rows, as often as they count; or (B,) bool, to make numbers of which an accelerator
            would have to be waited for.
    """
    if rows.dtype == torch.bool:
        return total(grads_BD.flatten(1).where(rows[:, None], 0.0)).view(grads_BD.shape[1:])
    return grads_BD.index_select(0, rows).sum(0, dtype=wide_dtype(grads_BD))


def added(parts: Sequence[Tensor]) -> Tensor:
    """Add up what the parameters of a unit contribute; (B,)."""
    return torch.stack(list(parts)).sum(0)
