"""A base that is divided among the ranks, under adapters that are whole on each of them (ours).

`fully_shard` (FSDP2) keeps a part of every frozen weight on each rank, and gathers a layer's weights while it runs.
What trains is left out of it: it stays what gates, taps, optimizers and checkpoints know, ordinary parameters with
ordinary gradients, which DDP averages. So selection, results and files are those of DDP, bit for bit; what is paid is
the adapters' memory on every rank, and what is saved is the exchange of them in every forward and backward.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from siftune.base.errors import UnsupportedError
from siftune.engine.ranks import join_launch, world_size
from siftune.models.layers import find_layers


def shard_base(model: nn.Module, layers: str | None = None) -> None:
    """Divide the frozen weights of a model among the ranks of a launch, layer by layer; in one process do nothing.

    Call it on every rank, when the adapters are on the model and before a Trainer gets it; or before DDP, in a loop of
    your own: `model = average_whole(model)`. Frozen weights go where the rank computes, trainable ones stay where they
    are. Afterwards run the whole model, not its parts: it is the call of the model that gathers weights.

    Args:
        model: Causal language model; the same on every rank. Changed in place.
        layers: Path of the decoder layers, where they are not found by structure.

    Raises:
        UnsupportedError: The weights are quantised, sharded already, or on several devices.
        LayerError: The layers cannot be found.

    Example:
        >>> shard_base(model)  # in one process nothing is divided
    """
    join_launch()
    if world_size() == 1:
        return
    _check(model)
    whole = {p for p in model.parameters() if p.requires_grad}
    for layer in find_layers(model, layers).layers:
        fully_shard(layer, ignored_params=whole)
    fully_shard(model, ignored_params=whole)
    model.register_forward_hook(_divide_again)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's base is divided among ranks."""
    return isinstance(model, FSDPModule)


def average_whole(model: nn.Module, **settings: Any) -> DistributedDataParallel:
    """Have DDP average the gradients of what is whole on every rank, and leave the rest alone.

    Args:
        model: After `shard_base`; what trains is where the rank computes.
        settings: For DistributedDataParallel.
    """
    divided = {name for name, p in model.named_parameters() if not p.requires_grad}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, divided)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(model, **settings)


def _divide_again(model: nn.Module, *_: Any) -> None:
    """Free what a pass without backward has gathered for the model's ends; FSDP2 keeps it for a backward.

    A rank that saves by itself would free it, and be the only one to gather it again: ranks would wait for ever.
    """
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        model.reshard()


def _check(model: nn.Module) -> None:
    """Refuse weights that cannot be divided."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise UnsupportedError("the model's weights are sharded already: load it whole, and call shard_base once")
    if any(not p.is_floating_point() for p in model.parameters()):
        raise UnsupportedError("the model's weights are quantised, which FSDP2 cannot divide: load it unquantised")
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedError(
            f"the model is on {', '.join(sorted(devices))}: load it without device_map, as every rank gets a part of it"
        )
