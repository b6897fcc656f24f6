"""Around an optimizer step: norms of the gradients before it, and steps that are longer or shorter than they came out.

Adam's steps do not grow with the gradient, so that a layer whose steps are to be longer must have them lengthened
*after* the optimizer: θ ← θ + (c − 1)·(θ_after − θ_before). That holds for every optimizer, with weight decay, and
where GradScaler skips the step: the change is zero then, and stays zero.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from siftune.numerics import wide_dtype


class ScaledSteps:
    """Values of some parameters before an optimizer step, from which it is made longer or shorter afterwards.

    They are held during the step alone: one copy of the parameters that are named.

    Args:
        lengths: parameter -> how many times as long its step is to be; 0 takes it back, bit for bit.
    """

    def __init__(self, lengths: Mapping[nn.Parameter, float]) -> None:
        self._before = [(p, p.detach().clone(), length) for p, length in lengths.items() if length != 1]

    def apply(self) -> None:
        """Put each parameter at before + length·(after − before)."""
        with torch.no_grad():
            for parameter, before, length in self._before:
                parameter.lerp_(before, 1 - length)  # as torch computes it: exact for 0, and where nothing has changed
        self._before.clear()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of the gradients of some parameters together; a float32 or float64 scalar, 0 without gradients."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(grad, dtype=wide_dtype(grad)) for grad in grads]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return whole
