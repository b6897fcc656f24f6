"""Models larger than memory: the decoder layers' weights stay in their safetensors files, and are read as they run.

Everything else, embeddings and head, is loaded. `accelerate` reads a module's weights before its forward and lets go of
them after it; while a graph needs them, they stay. So a pass that goes layer by layer has one layer in memory; in a
block of `held` it reads that layer once for all batches.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import align_module_device
from torch import Tensor, nn

from siftune.models.layers import find_layers


def streamed_map(source: Any) -> dict[str, Any]:
    """A device map that leaves a model's decoder layers on disk, and has the rest on the accelerator, or the CPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_config(config)
    path = find_layers(model).path
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    rest = {name for name, module in model.named_modules() if _has_tensors(module) and not name.startswith(f"{path}.")}
    return {**dict.fromkeys(rest, str(here)), path: "disk"}


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A tensor of a model, by its name in the state dict; read from its file where the layer is not loaded."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module):
        tensor: Tensor = getattr(module, leaf)
        return tensor.detach()


@contextmanager
def held(layer: nn.Module) -> Iterator[None]:
    """Read a layer's weights once for a block in which it runs several times; one that is loaded stays as it is."""
    found = [(module, getattr(module, "_hf_hook", None)) for module in layer.modules()]
    with ExitStack() as undo:
        for module, hook in found:
            if isinstance(hook, AlignDevicesHook) and hook.offload:
                hook.pre_forward(module)
                hook.offload = False  # so that it neither reads them again nor lets go of them
                undo.callback(_let_go, module, hook)
        yield


def _let_go(module: nn.Module, hook: AlignDevicesHook) -> None:
    hook.offload = True
    hook.post_forward(module, None)


def _has_tensors(module: nn.Module) -> bool:
    return bool([*module.parameters(recurse=False), *module.buffers(recurse=False)])
