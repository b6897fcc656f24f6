"""DeepSpeed's ZeRO under a Trainer whose callbacks choose layers or rows (ours).

Gates and taps want adapters that are whole while a layer runs, and an optimizer that can leave a layer out. ZeRO gives
both, where it is told so before its engine is made:

- *Whole*: stage 3 divides every weight among the ranks and gathers those of a module while it runs. What trains is made
  *persistent* and *external*, DeepSpeed's words for what stays whole; the base is divided. Its hooks are taken off the
  modules that hold what trains: there is nothing left to gather, and they would look at what stands in there.
- *By layer*, where layers are chosen: ZeRO flattens each parameter group of the optimizer into one tensor with one
  state. So each layer gets a group of its own, and just before a step the gradients of the layers that do not train
  are taken away: what has no gradient is skipped, with its momentum and its count of steps, as under DDP.

Gradients reach ZeRO as they reach DDP, by their parameters' accumulators, and it averages them. It keeps neither whole
gradients nor a state for a parameter, so what looks at those is refused.
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
    """Have DeepSpeed keep what trains whole, before its engine is made; in a Trainer without it do nothing.

    Args:
        trainer: With the model that is trained, adapters on it.
        layers: Path of the decoder layers, where they are not found by structure.
        apart: The optimizer is to hold every layer apart, as layers are chosen.
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
        if isinstance(optimizer, torch.optim.Optimizer):  # else it is a place for one that DeepSpeed makes
            split_by_layer(optimizer, trainer.model, layers)
        return optimizer

    trainer.create_optimizer = create_optimizer


def split_by_layer(optimizer: torch.optim.Optimizer, model: nn.Module, layers: str | None = None) -> None:
    """Divide an optimizer's parameter groups so that none has parameters of two layers; settings stay.

    Args:
        optimizer: Before its first step. Changed in place.
        model: Whose parameters it trains.
        layers: Path of the decoder layers, where they are not found by structure.
    """
    number = {id(p): group.index for group in group_by_layer(model, layers) for p in group.parameters.values()}
    groups: list[dict[str, Any]] = []
    for whole in optimizer.param_groups:
        parts: dict[int, list[nn.Parameter]] = {}
        for parameter in whole["params"]:
            parts.setdefault(number.get(id(parameter), -1), []).append(parameter)
        groups += [{**whole, "params": part, _LAYER: layer} for layer, part in parts.items()]
    optimizer.param_groups[:] = groups


def keep_whole(trainer: Trainer | None, model: nn.Module, layers: str | None = None) -> None:
    """Make what trains whole for good, where stage 3 has divided it; call it when the engine is made.

    Args:
        trainer: The Trainer, where there is one; without DeepSpeed nothing is done.
        model: Its model.
        layers: Path of the decoder layers, where they are not found by structure.

    Raises:
        UnsupportedError: DeepSpeed does not keep it whole.
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
                    "DeepSpeed's stage 3 divides the adapters, which are to stay whole: give the callbacks to the "
                    "Trainer when it is made, and leave stage3_model_persistence_threshold out of DeepSpeed's config"
                )
            divided.is_external_param = True  # else it is divided even so until DeepSpeed knows the modules' order
            if divided.ds_status.name != "AVAILABLE":
                waiting.append(divided)
    if waiting:
        waiting[0].all_gather(param_list=waiting)


def skip(optimizer: Any, idle: Callable[[], Collection[int]], forget: bool) -> Any:
    """Have every step of an optimizer leave some layers as they are.

    Args:
        optimizer: The one that DeepSpeed drives, of which `prepare` has divided the groups.
        idle: Gives the numbers of the layers that do not train in this step.
        forget: Drop their state in the optimizer.

    Returns:
        A handle, whose `remove()` ends it.

    Raises:
        UnsupportedError: It has several layers in a group.
    """
    if any(_LAYER not in group for group in optimizer.param_groups):
        raise UnsupportedError(
            "DeepSpeed's optimizer holds all layers in one piece, so that none can be left out: give the callbacks to "
            "the Trainer when it is made, and leave `optimizer` out of DeepSpeed's config, so that the Trainer makes it"
        )

    def hook(stepping: torch.optim.Optimizer, *_: Any) -> None:
        layers = idle()
        for group in stepping.param_groups:  # one at a time in most stages
            for flat in group["params"] if group[_LAYER] in layers else ():
                flat.grad = None
                if forget:
                    stepping.state.pop(flat, None)

    return optimizer.register_step_pre_hook(hook)


def refuse_in_loops(optimizer: Any) -> None:
    """Refuse DeepSpeed's optimizer in a loop of one's own: it steps group by group, and is not told of layers.

    Raises:
        UnsupportedError: It is DeepSpeed's.
    """
    while optimizer is not None:
        if type(optimizer).__module__.startswith("deepspeed.runtime."):  # its FusedAdam and the like step as others do
            raise UnsupportedError(
                "attach does not go with DeepSpeed's engine, which is to know of the layers before it is made: give "
                "the method to a transformers Trainer as a callback, or take DDP"
            )
        optimizer = getattr(optimizer, "optimizer", None)


def _owners(model: nn.Module, layers: str | None) -> list[nn.Module]:
    """The modules in the decoder layers that hold what trains."""
    return list({slot.owner: None for group in group_by_layer(model, layers) for slot in parameter_owners(group)})


def _unhook(module: nn.Module) -> None:
    """Take DeepSpeed's hooks off one module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "__module__", "").startswith("deepspeed."):
                del hooks[key]


def _size(parameter: Any) -> int:
    """Number of elements, also of a parameter that is divided."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _threshold(settings: dict[str, Any], model: nn.Module) -> int:
    """The largest parameter that stays whole by the config; transformers puts ten rows of hidden states for auto."""
    given = settings.get(_THRESHOLD, 100_000)
    return 10 * int(getattr(model.config, "hidden_size", 0)) if given == "auto" else int(given)
