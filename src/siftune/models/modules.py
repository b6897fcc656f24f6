"""Properties of modules, and context managers that restore what a block changes.

Predicates: linear modules, mixers of Mamba, banks of experts. Context managers: modes, `requires_grad` and `grad`, and
torch's generators.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from siftune.base.errors import DataError


def inner_model(model: Any) -> Any:
    """Return the transformers model, in which PEFT puts its layers; the model itself if PEFT does not wrap it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map: torch's, GPT-2's transposed one, or a quantised one."""
    quantised = hasattr(module, "in_features") and hasattr(module, "out_features") and not module._modules
    return isinstance(module, nn.Linear | Conv1D) or quantised


def is_mamba(module: nn.Module) -> bool:
    """Whether a module is a mixer of Mamba."""
    return {"A_log", "D"} <= module._parameters.keys()


def expert_banks(layer: nn.Module) -> list[nn.Module]:
    """Return the modules in a layer that hold its experts."""
    return [child for block in layer.modules() for child in block.children() if expert_count(child)]


def expert_count(module: nn.Module) -> int:
    """Return how many experts a module holds; 0 unless it is a bank of experts.

    A bank is a ModuleList, or one module with weights of (experts, out, in).
    """
    if isinstance(module, nn.ModuleList):
        return len(module)
    others = nn.modules.conv._ConvNd | nn.ParameterDict | nn.ParameterList  # the last two: parts of adapters
    if isinstance(module, others) or is_mamba(module):  # three dimensions as well
        return 0
    return next((p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1), 0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode and without gradients; restore the mode of each module."""
    # not inference_mode: training could not use tensors that the model caches inside it (rotary tables)
    with evaluated(model), torch.no_grad():
        yield


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode; restore the mode of each module."""
    with _modes_restored(model):
        model.eval()
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
    """Restore modes, `requires_grad` and `grad` after the block."""
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
    """Compute gradients of some parameters only, by default of none.

    Modes, `requires_grad` and `grad` are restored after the block.
    """
    chosen = {id(parameter) for parameter in parameters}
    with flags_restored(model):
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        yield


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the global generators within a block, and restore them."""
    on_accelerator = device.type not in ("cpu", "mps", "meta")  # torch cannot fork the generators of the last two
    devices = range(torch.accelerator.device_count()) if on_accelerator else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if on_accelerator else "cuda"):
        torch.manual_seed(seed % 2**63)
        yield


def model_device(model: nn.Module) -> torch.device:
    """Return the device that the model's input ids belong on."""
    return next(model.parameters()).device


def check_window(model: Any, longest: int, what: str, remedy: str = "give a smaller --max-length") -> None:
    """Refuse rows that are longer than the model's window.

    Args:
        model: The model.
        longest: Tokens of the longest row.
        what: What it is.
        remedy: What to do, as the end of a sentence.

    Raises:
        DataError: It is longer.
    """
    window = model_window(model)
    if window is not None and longest > window:
        raise DataError(f"{what} takes {longest} tokens, but the model's window is {window}; {remedy}")


def model_window(model: Any) -> int | None:
    """Return the number of positions that the model was built for, or None if its config doesn't say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
