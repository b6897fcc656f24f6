"""What samples are compared with: the support set's gradient, and Adam's metric."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from siftune.errors import RecipeError
from siftune.methods.batches import Batch, Loss, label_weight

_LIFT = 2.0**10  # keeps float16 gradients out of the range where they vanish; taken off again


def support_gradient(
    model: nn.Module, batches: Sequence[Batch], loss: Loss, parameters: Sequence[nn.Parameter], seed: int
) -> dict[nn.Parameter, Tensor]:
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
    sums: dict[nn.Parameter, Tensor] = {}
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


def adam_metric(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """Adam's metric: 1 / (√v̂ + ε), from its running mean v of squared gradients; ones before the first step.

    Args:
        optimizer: Adam, AdamW, or one that keeps `exp_avg_sq` as they do.
        parameter: One of its parameters.

    Returns:
        The metric's diagonal, in the parameter's shape.

    Raises:
        RecipeError: The optimizer keeps no such mean.
    """
    state = optimizer.state.get(parameter, {})
    if not state:
        return torch.ones_like(parameter)
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    if "exp_avg_sq" not in state or "betas" not in group:
        raise RecipeError(
            f'score="preconditioned" takes the metric of Adam or AdamW, but {type(optimizer).__name__} keeps no '
            'exp_avg_sq; use torch\'s AdamW (transformers: optim="adamw_torch"), or score="inner"'
        )
    correction = 1 - group["betas"][1] ** float(state["step"])
    metric: Tensor = 1 / ((state["exp_avg_sq"] / correction).sqrt() + group["eps"])
    return metric
