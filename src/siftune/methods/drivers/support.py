"""The support set: rows that others are compared with, their gradient, and its average over steps.

`Support` may form it in every `every`-th step alone, which costs less, and average what was formed (`decay`), so that
more rows stand behind a score; both are ours.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from siftune.base.numerics import all_finite, widened
from siftune.methods.drivers.batches import Batch, Loss, label_weight

Gradients = dict[nn.Parameter, Tensor]


class Support:
    """The gradient of a support set, over the steps of a run.

    Args:
        size: Rows that are drawn for it, where they are drawn.
        every: Steps between two times that it is formed.
        decay: Share of the average that stays in a step, so that decay^every of it stay when it is formed anew; 0:
            there is no average.

    Example:
        >>> weight, support = nn.Parameter(torch.zeros(2)), Support(size=8, every=2, decay=0.5)
        >>> for step in range(3):
        ...     support.begin(step, lambda step=step: {weight: torch.tensor([1.0, 2.0 * step])})
        ...     support.end()
        >>> support.gradients[weight]  # of the steps 0 and 2: a quarter of the first, three of the second
        tensor([1., 3.])
    """

    def __init__(self, size: int, every: int = 1, decay: float = 0.0) -> None:
        self.size = size
        self.gradients: Gradients = {}  # what rows are compared with in this step
        self.average: Gradients = {}  # what is left of earlier steps, as checkpoints keep it; empty without any
        self._every = every
        self._sound = True
        self._stays = decay**every

    @property
    def lasts(self) -> bool:
        """Whether a step's support depends on earlier steps."""
        return self._every > 1 or self._stays > 0

    def begin(self, step: int, form: Callable[[], Gradients]) -> None:
        """Begin a step: form the gradient where it is time to. A step that begins again is as if it began once.

        An average that takes in a NaN never loses it, so a gradient with one is left out of it.

        Args:
            step: Optimizer steps done before it.
            form: Draws rows and returns their gradient; a parameter that is left out keeps its average.
        """
        if self.average and step % self._every:
            self.gradients = self.average
        else:
            fresh = form()
            self._sound = not self.lasts or not fresh or all_finite(list(fresh.values()))
            self.gradients = self._moved(fresh) if self._sound else {**fresh, **self.average}

    def end(self) -> None:
        """Note that the gradients of a step are complete."""
        if self.lasts and self._sound:
            self.average = self.gradients

    def _moved(self, fresh: Gradients) -> Gradients:
        if not self._stays:
            return {**self.average, **fresh}
        wide = {parameter: widened(grad) for parameter, grad in fresh.items()}
        known = self.average
        return {**known, **{p: known[p].lerp(g, 1 - self._stays) if p in known else g for p, g in wide.items()}}


_LIFT = 2.0**10  # keeps float16 gradients out of the range where they vanish; taken off again


def support_gradient(
    model: nn.Module, batches: Sequence[Batch], loss: Loss, parameters: Sequence[nn.Parameter], seed: int
) -> Gradients:
    """Gradient of the mean loss over the support set; parameters' `grad` stays as it is.

    The model runs in the mode it is in; dropout draws from a generator of its own.

    Args:
        model: The model, not wrapped for several ranks.
        batches: The support set.
        loss: Loss of a batch, a scalar; batches are weighted by their labels.
        parameters: Parameters to differentiate for.
        seed: Seed of dropout.

    Returns:
        parameter -> gradient, in the parameter's shape and dtype; parameters that the loss does not depend on are left
        out.
    """
    weights = [label_weight(batch) for batch in batches]
    sums: Gradients = {}
    with _own_randomness(parameters[0].device, seed), torch.enable_grad():
        for batch, weight in zip(batches, weights, strict=True):
            if weight > 0:
                lifted = loss(model, batch) * (_LIFT * weight / sum(weights))
                grads = torch.autograd.grad(lifted, parameters, allow_unused=True)
                for parameter, grad in zip(parameters, grads, strict=True):
                    if grad is not None:
                        grad = grad / _LIFT
                        sums[parameter] = sums[parameter] + grad if parameter in sums else grad
    return sums


@contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global generators for the time of a block, and put them back as they were."""
    on_accelerator = device.type not in ("cpu", "mps")  # torch cannot fork the generator of the latter
    devices = range(torch.accelerator.device_count()) if on_accelerator else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if on_accelerator else "cuda"):
        torch.manual_seed(seed % 2**63)
        yield
