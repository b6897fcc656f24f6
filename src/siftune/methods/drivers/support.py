"""The support set: rows to compare others with, their gradient, and its running mean over steps."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from siftune.base.errors import UnsupportedError
from siftune.base.numerics import all_finite, widened
from siftune.methods.drivers.batches import label_weight
from siftune.models.loss import Batch, Loss
from siftune.models.modules import own_randomness

Gradients = dict[nn.Parameter, Tensor]

DECAY = 0.9
"""Share of the running mean of support gradients that remains after a step, if they are formed in every n-th step
(ours)."""


class Support:
    """The gradient of a support set over the steps of a run.

    With `every` above 1 (ours) it is formed in every `every`-th step, which costs less, and averaged, so that more rows
    are behind a score. DECAY^every of the mean remains when it is formed again.

    Args:
        size: Rows per draw, if rows are drawn.
        every: Steps between two support gradients.

    Example:
        >>> weight, support = nn.Parameter(torch.zeros(2)), Support(size=8, every=2)
        >>> for step in range(3):
        ...     support.begin(step, lambda step=step: {weight: torch.tensor([1.0, 100.0 * step])})
        ...     support.end()
        >>> support.gradients[weight]  # of steps 0 and 2: 0.81 of the first, 0.19 of the second
        tensor([ 1., 38.])
    """

    def __init__(self, size: int, every: int = 1) -> None:
        self.size = size
        self.gradients: Gradients = {}  # for comparison in this step
        self.average: Gradients = {}  # running mean over earlier steps, saved in checkpoints; empty with every = 1
        self._every = every
        self._finite = True

    @property
    def lasts(self) -> bool:
        """Whether a step's support depends on earlier steps."""
        return self._every > 1

    def begin(self, step: int, form: Callable[[], Gradients]) -> None:
        """Begin a step, and form the gradient if it is time. To begin a step twice has the effect of once.

        The mean would never lose a NaN, so a gradient with a NaN does not enter it.

        Args:
            step: Optimizer steps before it.
            form: Draws rows and returns their gradient; a parameter that is not in it keeps its mean.
        """
        if self.average and step % self._every:
            self.gradients = self.average
            return
        fresh = form()
        if not self.lasts:
            self.gradients = fresh
            return
        self._finite = not fresh or all_finite(list(fresh.values()))
        if not self._finite:
            self.gradients = {**fresh, **self.average}
            return
        mean, wide = self.average, {parameter: widened(grad) for parameter, grad in fresh.items()}
        moved = {p: mean[p].lerp(g, 1 - DECAY**self._every) if p in mean else g for p, g in wide.items()}
        self.gradients = {**mean, **moved}

    def end(self) -> None:
        """End a step, whose gradients are complete."""
        if self.lasts and self._finite:
            self.average = self.gradients


_LIFT = 2.0**10  # keeps float16 gradients above underflow; divided out again


def support_gradient(
    model: nn.Module, batches: Sequence[Batch], loss: Loss, parameters: Sequence[nn.Parameter], seed: int
) -> Gradients:
    """Gradient of the mean loss over the support set; the `grad` of the parameters is unchanged.

    The model keeps its train or eval mode; dropout uses a generator of its own.

    Args:
        model: The model, not wrapped for several ranks.
        batches: The support set.
        loss: Loss of a batch, a scalar; batches are weighted by their labels.
        parameters: Parameters to differentiate.
        seed: Seed of dropout.

    Returns:
        parameter -> gradient, in the parameter's shape and dtype, without the parameters that the loss does not depend
        on.
    """
    weights = [label_weight(batch) for batch in batches]
    sums: Gradients = {}
    with own_randomness(parameters[0].device, seed), torch.enable_grad():
        for batch, weight in zip(batches, weights, strict=True):
            if weight > 0:
                lifted = loss(model, batch) * (_LIFT * weight / sum(weights))
                grads = _gradients(lifted, parameters)
                formed = {p: grad for p, grad in zip(parameters, grads, strict=True) if grad is not None}
                if not formed:
                    raise UnsupportedError(_REENTRANT)
                lowered = torch._foreach_div([*formed.values()], _LIFT)
                for parameter, grad in zip(formed, lowered, strict=True):
                    sums[parameter] = sums[parameter] + grad if parameter in sums else grad
    return sums


_REENTRANT = (
    "activation checkpointing with use_reentrant=True forms no gradient of support rows: set use_reentrant=False, or "
    'with GAST support="rest"'
)


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint" in str(error) and ".grad()" in str(error):  # torch, in the layers that are checkpointed
            raise UnsupportedError(_REENTRANT) from error
        raise
