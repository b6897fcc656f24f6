"""DeepSpeed's ZeRO under a Trainer with callbacks that choose layers or rows (ours).

Gates and taps need adapters that are unsharded while a layer runs, and an optimizer that can skip a layer. ZeRO
provides both if it is configured before its engine is made:

- *Unsharded adapters*: stage 3 shards every weight among the ranks, and gathers those of a module while it runs.
  Trainable parameters are made *persistent* and *external*, which in DeepSpeed means that they stay unsharded; the base
  is sharded. DeepSpeed's hooks are removed from the modules with trainable parameters. There is nothing to gather, and
  the hooks would read the tensors that stand in for the parameters.
- *Layer by layer*, if layers are chosen: ZeRO flattens each parameter group of the optimizer into one tensor with one
  state. Therefore each layer gets a group of its own. Just before a step the gradients of the layers that do not train
  are removed. A group without a gradient is skipped, including its momentum and its step count, as under DDP.

Gradients reach ZeRO as they reach DDP, through their parameters' accumulators, and it averages them.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from siftune.base.errors import UnsupportedError
from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import parameter_owners

_LAYER = "siftune_layer"  # key of a parameter group: the layer's number, -1 for what is in no layer
_THRESHOLD = "stage3_param_persistence_threshold"


def is_used(trainer: Trainer | None) -> bool:
    """Whether a Trainer trains by DeepSpeed."""
    return bool(getattr(trainer, "is_deepspeed_enabled", False))


def prepare(trainer: Trainer, layers: str | None = None, apart: bool = True) -> None:
    """Have DeepSpeed keep trainable parameters unsharded, before its engine is made; without DeepSpeed do nothing.

    Args:
        trainer: A Trainer whose model has adapters.
        layers: Path of the decoder layers, if their structure does not identify them.
        apart: Put every layer into a parameter group of its own, since layers are chosen.
    """
    if not is_used(trainer):
        return
    settings = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config.get("zero_optimization", {})
    if settings.get("stage") == 3:
        held = (p for owner in _owners(trainer.model, layers) for p in owner.parameters(recurse=False))
        settings[_THRESHOLD] = max(_threshold(settings, trainer.model), *map(_size, held))
    if not apart:
        return
    make = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = make(*args, **kwargs)
        if isinstance(optimizer, torch.optim.Optimizer):  # else a placeholder for one that DeepSpeed makes
            split_by_layer(optimizer, trainer.model, layers)
        return optimizer

    trainer.create_optimizer = create_optimizer


def split_by_layer(optimizer: torch.optim.Optimizer, model: nn.Module, layers: str | None = None) -> None:
    """Split an optimizer's parameter groups so that none has parameters of two layers; their settings are unchanged.

    Args:
        optimizer: Before its first step. Changed in place.
        model: The model that it trains.
        layers: Path of the decoder layers, if their structure does not identify them.
    """
    number = {id(p): group.index for group in group_by_layer(model, layers) for p in group.parameters.values()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parts: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(number.get(id(parameter), -1), []).append(parameter)
        groups += [{**group, "params": part, _LAYER: layer} for layer, part in parts.items()]
    optimizer.param_groups[:] = groups


def keep_unsharded(trainer: Trainer | None, model: nn.Module, layers: str | None = None) -> None:
    """Unshard trainable parameters permanently if stage 3 has sharded them; call it when the engine is made.

    Args:
        trainer: The Trainer, or None; without DeepSpeed do nothing.
        model: Its model.
        layers: Path of the decoder layers, if their structure does not identify them.

    Raises:
        UnsupportedError: DeepSpeed does not keep them unsharded.
    """
    if not is_used(trainer):
        return
    waiting = []
    for owner in _owners(model, layers):
        _unhook(owner)
        for parameter in owner.parameters(recurse=False):
            divided: Any = parameter
            if not hasattr(divided, "ds_persist"):
                continue
            if not divided.ds_persist:
                raise UnsupportedError(
                    "DeepSpeed's stage 3 shards the adapters, which must stay unsharded: pass the callbacks to the "
                    "Trainer's constructor, and leave stage3_model_persistence_threshold out of DeepSpeed's config"
                )
            divided.is_external_param = True  # else it is sharded until DeepSpeed knows the order of the modules
            if divided.ds_status.name != "AVAILABLE":
                waiting.append(divided)
    if waiting:
        waiting[0].all_gather(param_list=waiting)


def skip(optimizer: Any, idle: Callable[[], Collection[int]]) -> Any:
    """Have every step of an optimizer skip some layers.

    Args:
        optimizer: The one that DeepSpeed drives, with groups split by `prepare`.
        idle: Returns the numbers of the layers that do not train in this step.

    Returns:
        A handle with `remove()`.

    Raises:
        UnsupportedError: A group has several layers.
    """
    if any(_LAYER not in group for group in optimizer.param_groups):
        raise UnsupportedError(
            "DeepSpeed's optimizer holds all layers in one tensor, so that none can be skipped: pass the callbacks to "
            "the Trainer's constructor, and leave `optimizer` out of DeepSpeed's config, so that the Trainer makes it"
        )

    def hook(stepping: torch.optim.Optimizer, *_: Any) -> None:
        layers = idle()
        for group in stepping.param_groups:  # one at a time in most stages
            for flat in group["params"] if group[_LAYER] in layers else ():
                flat.grad = None

    return optimizer.register_step_pre_hook(hook)


def refuse_in_loops(optimizer: Any) -> None:
    """Refuse DeepSpeed's optimizer in a custom loop: it steps group by group, and does not know the layers.

    Raises:
        UnsupportedError: It is DeepSpeed's.
    """
    while optimizer is not None:
        if type(optimizer).__module__.startswith("deepspeed.runtime."):  # its FusedAdam and the like step as others do
            raise UnsupportedError(
                "attach does not support DeepSpeed's engine, which must know the layers before it is made: pass the "
                "method to a transformers Trainer as a callback, or use DDP"
            )
        optimizer = getattr(optimizer, "optimizer", None)


def _owners(model: nn.Module, layers: str | None) -> list[nn.Module]:
    """The modules in the decoder layers with trainable parameters."""
    return list({slot.owner: None for group in group_by_layer(model, layers) for slot in parameter_owners(group)})


def _unhook(module: nn.Module) -> None:
    """Remove DeepSpeed's hooks from one module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__module__", "").startswith("deepspeed."):
                del hooks[key]


def _size(parameter: Any) -> int:
    """Number of elements, also of a sharded parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _threshold(settings: dict[str, Any], model: nn.Module) -> int:
    """The config's threshold for unsharded parameters; transformers takes ten rows of hidden states for auto."""
    threshold = settings.get(_THRESHOLD, 100_000)
    return 10 * int(getattr(model.config, "hidden_size", 0)) if threshold == "auto" else int(threshold)
