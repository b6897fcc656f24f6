"""Evaluation mode for the time of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode and without gradients; each module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: what a model caches inside it (rotary tables) would be of no use in training.
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
