"""LN-tuning: the weights and biases of the decoder layers' norms train, in copies (arXiv 2312.11420)."""

import logging

import torch
from peft import LNTuningConfig
from torch import nn

from siftune.base.errors import AdapterError
from siftune.models.adapters.attach import short_names
from siftune.models.adapters.registry import Shape
from siftune.models.layers import find_layers, inside

logger = logging.getLogger(__name__)


def ln(model: nn.Module, shape: Shape) -> LNTuningConfig:
    """PEFT's config for all norms of the decoder layers that have weights, or for those that are named.

    Raises:
        AdapterError: There is none, or none of that name.
    """
    path = find_layers(model).path
    norms = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(f"{path}.")
        and type(module).__name__.endswith("Norm")
        and module._parameters.get("weight") is not None
    }
    ends = tuple(shape.targets or ("",))
    chosen = {name: module for name, module in norms.items() if name.endswith(ends)}
    if not chosen:
        leaves = sorted({name.rpartition(".")[2] for name in norms})
        raise AdapterError(
            f"no norm with weights in the layers of {type(model).__name__} is called {' or '.join(ends)}; available: "
            f"{', '.join(leaves) or 'none'}"
        )
    chosen = inside(model, chosen, shape.layers)
    half = {p.dtype for module in chosen.values() for p in module.parameters()} - {torch.float32, torch.float64}
    if half:
        logger.warning("norms train in %s, in which small updates are lost: load the model in float32", *half)
    return LNTuningConfig(task_type="CAUSAL_LM", target_modules=short_names(model, chosen))
