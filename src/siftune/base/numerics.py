"""Numerics that several subjects share: the dtype that sums run in, algebra of samples' gradients, one draw.

Shapes: B samples, D values of a parameter. Sums run in float32, or float64 where the input is.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_LEAST_UNIFORM = 1e-300  # log 0 is −∞: a uniform number of exactly 0 would give a Gumbel of −∞ and tie with others


def widened(values: Tensor) -> Tensor:
    """The same values in the dtype that sums run in."""
    return values.to(wide_dtype(values))


def wide_dtype(values: Tensor) -> torch.dtype:
    """The dtype that sums over values run in: float64 for float64, float32 for all others."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


@cache
def has_float64(kind: str) -> bool:
    """Whether devices of a type, such as "cuda", have float64; Apple's have not."""
    try:
        torch.zeros(1, dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):
        return False
    return True


def copies_asynchronously(kind: str) -> bool:
    """Whether the host may continue while it copies a tensor to a device of a type, such as "cuda".

    On Apple's devices the copy may then read memory that is in use for something else (pytorch#189690).

    Example:
        >>> copies_asynchronously("cuda"), copies_asynchronously("mps")
        (True, False)
    """
    return kind != "mps"


def in_float64(values: Tensor) -> Tensor:
    """The same values in float64, on a device that computes well in it: theirs, or the CPU.

    Consumer GPUs have 1/32 of their float32 speed in it, or less; those for data centres have capability X.0.
    """
    slow = False
    if values.device.type == "cuda" and torch.version.hip is None:  # AMD's numbers mean something else
        major, minor = torch.cuda.get_device_capability(values.device)
        slow = minor > 0 or major > 10
    return (values.cpu() if slow or not has_float64(values.device.type) else values).double()


def as_before(values: Tensor, like: Tensor) -> Tensor:
    """Values from `in_float64` in the dtype of another tensor, then on its device."""
    return values.to(like.dtype).to(like.device)


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
    negative_gumbel = torch.log(-torch.log(uniform.clamp_min(_LEAST_UNIFORM)))
    return (log_weights - negative_gumbel).topk(count).indices.sort().values


def draw_layers(log_weights_L: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw layers one by one, without replacement, with probability ∝ their weight.

    Args:
        log_weights_L: (L,) float64 logarithms of the weights.
        count: Number of layers, 1 ≤ count ≤ L.
        generator: Source of randomness, on the CPU.

    Returns:
        (count,) int64 positions of layers, ascending.
    """
    uniform_L = torch.rand(log_weights_L.shape, generator=generator, dtype=torch.float64)
    return gumbel_top_k(log_weights_L, uniform_L, count)


def draw_uniform(layers: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of `layers` layers uniformly, without replacement; (count,) int64, ascending."""
    return draw_layers(torch.zeros(layers, dtype=torch.float64), count, generator)


def joined(grads: Sequence[Tensor]) -> Tensor:
    """Gradients of samples for several parameters, (S, …) each, side by side; (S, D).

    If they are beside each other in memory, as the tape writes them, nothing is copied.
    """
    first, width = grads[0], sum(grad[0].numel() for grad in grads)
    start = first.storage_offset()
    for grad in grads:
        plain = type(grad) is Tensor and grad.stride(0) == width and grad[0].is_contiguous()
        beside = plain and grad.storage_offset() == start and grad.untyped_storage()._cdata == _storage_of(first)
        if not beside or (grad.dtype, len(grad)) != (first.dtype, len(first)):
            return _copied_together(grads)
        start += grad[0].numel()
    return first.as_strided((len(first), width), (width, 1))


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _copied_together(grads: Sequence[Tensor]) -> Tensor:
    same = len({(grad.dtype, grad.device) for grad in grads}) == 1
    parts = grads if same else [widened(grad).to(grads[0].device) for grad in grads]
    return torch.cat([part.flatten(1) for part in parts], 1)


def split_like(values_D: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Split what was formed of `joined(parts)`, (D,), into tensors of the parameters' shapes, on their devices."""
    pieces = torch.split(values_D, [part[0].numel() for part in parts])
    return [piece.view(part.shape[1:]).to(part.device) for piece, part in zip(pieces, parts, strict=True)]


def squares(grads_BD: Tensor) -> Tensor:
    """Squared length of every row's gradient; (B,)."""
    lengths_B: Tensor = torch.linalg.vector_norm(grads_BD.flatten(1), dim=1, dtype=wide_dtype(grads_BD))
    return lengths_B.square()


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no value is infinite or no number; the tensors may be on several devices."""
    return bool(torch.isfinite(side_by_side(torch._foreach_norm(list(tensors)))).all())


def side_by_side(numbers: Sequence[Tensor]) -> Tensor:
    """Put numbers that may be on several devices into one tensor, on the first one's; (N,)."""
    return torch.stack([number.to(numbers[0].device) for number in numbers])


def sum_of(grads_BD: Tensor, rows_K: Tensor) -> Tensor:
    """Sum of the gradients of some rows, (K,) int64 row numbers; the shape of the parameter."""
    return grads_BD.index_select(0, rows_K).sum(0, dtype=wide_dtype(grads_BD))


def added(parts: Sequence[Tensor]) -> Tensor:
    """Add up what the parameters of a unit contribute; (B,)."""
    return torch.stack(list(parts)).sum(0)
