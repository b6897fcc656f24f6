"""What a block may change about a model besides its weights: modes, `requires_grad` and `grad`, put back afterwards."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode and without gradients; each module's own mode comes back afterwards."""
    with _modes_restored(model):
        model.eval()
        # Not inference_mode: what a model caches inside it (rotary tables) would be of no use in training.
        with torch.no_grad():
            yield


@contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def flags_restored(model: nn.Module) -> Iterator[None]:
    """Put back modes, `requires_grad` and `grad` as they were before the block."""
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        with _modes_restored(model):
            yield
    finally:
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad


@contextmanager
def trainable_only(model: nn.Module, parameters: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Let gradients flow to some parameters only, by default to none, so that none is computed in vain.

    Afterwards modes, `requires_grad` and `grad` are as before the block.
    """
    chosen = {id(parameter) for parameter in parameters}
    with flags_restored(model):
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        yield
