"""Models larger than memory: the decoder layers' weights stay in their safetensors files, and are read when they run.

Everything else, embeddings and head, is loaded. `accelerate` reads a module's weights before its forward and frees
them after it, unless a graph needs them. So a pass layer by layer has one layer in memory. In a block of `held` that
layer is read once for all batches.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import align_module_device
from torch import Tensor, nn

from siftune.models.layers import find_layers


def streamed_map(config: Any) -> dict[str, Any]:
    """Make a device map for a config, with the decoder layers on disk and the rest on the accelerator, or the CPU."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    path = find_layers(model).path
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    rest = {name for name, module in model.named_modules() if _has_tensors(module) and not name.startswith(f"{path}.")}
    return {**dict.fromkeys(rest, str(here)), path: "disk"}


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """Return a tensor of a model by its name in the state dict; it is read from its file if the layer is not loaded."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module):
        tensor: Tensor = getattr(module, leaf)
        return tensor.detach()


@contextmanager
def held(layer: nn.Module) -> Iterator[None]:
    """Read a layer's weights once for a block in which it runs several times; a loaded layer is not changed."""
    with ExitStack() as undo:
        for module in layer.modules():
            hook = getattr(module, "_hf_hook", None)
            if isinstance(hook, AlignDevicesHook) and hook.offload:
                hook.pre_forward(module)
                hook.offload = False  # it neither reads them again nor frees them
                undo.callback(_free, module, hook)
        yield


def _free(module: nn.Module, hook: AlignDevicesHook) -> None:
    hook.offload = True
    hook.post_forward(module, None)


def _has_tensors(module: nn.Module) -> bool:
    return bool([*module.parameters(recurse=False), *module.buffers(recurse=False)])
