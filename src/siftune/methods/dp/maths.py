"""Clipping of rows' gradients, and noise on their sum.

Shapes: B rows, D values of a parameter, in any number of dimensions. Sums run in float32, or float64 if the
input is float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from siftune.base import numerics
from siftune.methods.dp.secret import Stream


def clip_factors(grads: Sequence[Tensor], threshold: float) -> Tensor:
    """Factor for each row's gradient, so that its norm is at most the threshold.

    Args:
        grads: (B, …) gradients of the rows, for each of the parameters that are clipped together.
        threshold: Largest norm over all of them, above 0.

    Returns:
        (B,) min(1, threshold / norm); 0 for rows whose norm is not finite.

    Example:
        >>> clip_factors([torch.tensor([[3.0], [0.3], [torch.inf]]), torch.tensor([[4.0], [0.4], [0.0]])], 1.0)
        tensor([0.2000, 1.0000, 0.0000])
    """
    first = grads[0].device
    norms_B = numerics.added([numerics.squares(part).to(first) for part in grads]).sqrt()
    return torch.where(norms_B.isfinite(), (threshold / norms_B).clamp(max=1.0), 0.0)


def clipped_sum(grads_BD: Tensor, factors_B: Tensor) -> Tensor:
    """Sum of the rows' gradients for one parameter, each times its factor; rows of factor 0 may hold anything.

    Returns:
        (D,) in the parameter's shape.
    """
    wide_BD, counts_B = numerics.widened(grads_BD).flatten(1), factors_B > 0
    if wide_BD.device.type != "cpu" or not counts_B.all():  # on a CPU the copy is slow
        wide_BD = wide_BD.where(counts_B[:, None].to(wide_BD.device), 0.0)
    total_D: Tensor = factors_B.to(wide_BD) @ wide_BD
    return total_D.view(grads_BD.shape[1:])


def noised_means(totals: Sequence[Tensor], std: float, batch: float, stream: Stream) -> list[Tensor]:
    """Sums over rows with Gaussian noise, divided by the expected number of rows.

    Noise and sums are added in float64 on the CPU, and then rounded to the sums' dtype. They are copied there and back
    together, since the host waits for every copy.

    Args:
        totals: The sums, of one dtype and on one device.
        std: Standard deviation of the noise on each of its values, σ C.
        batch: Expected rows b.
        stream: Source of the noise.
    """
    together_D = torch.cat([total.flatten() for total in totals])
    noise_D = torch.cat([stream.normal(total.numel()) for total in totals])
    noised_D = numerics.as_before(noise_D.mul_(std).add_(together_D.cpu()).div_(batch), together_D)
    pieces = torch.split(noised_D, [total.numel() for total in totals])
    return [piece.view_as(total) for piece, total in zip(pieces, totals, strict=True)]
