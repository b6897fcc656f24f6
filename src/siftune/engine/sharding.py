"""A base sharded among the ranks, under unsharded adapters (ours).

`fully_shard` (FSDP2) keeps a part of every frozen weight on each rank, and gathers a layer's weights while it runs.
Trainable parameters are excluded: gates, taps, optimizers and checkpoints see ordinary parameters with ordinary
gradients, which DDP averages. Selection, results and files are therefore those of DDP, bit for bit. The cost is the
adapters' memory on every rank; the benefit is that forward and backward need not exchange them.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from siftune.base.errors import UnsupportedError
from siftune.base.ranks import join_launch, world_size
from siftune.models.layers import find_layers


def shard_base(model: nn.Module, layers: str | None = None) -> None:
    """Shard the frozen weights of a model among the ranks of a launch, layer by layer; in one process do nothing.

    Call it on every rank after attaching the adapters and before making a Trainer. In a custom loop call it before DDP:
    `model = average_trainable(model)`. Frozen weights move to the rank's device; trainable ones stay on theirs.
    Afterwards call the model itself, not its parts, since that call gathers weights.

    Args:
        model: Causal language model; the same on every rank. Changed in place.
        layers: Path of the decoder layers, if their structure does not identify them.

    Raises:
        UnsupportedError: The weights are quantized, sharded already, or on several devices.
        LayerError: The layers cannot be found.

    Example:
        >>> shard_base(model)  # in one process nothing is sharded
    """
    join_launch()
    if world_size() == 1:
        return
    _check(model)
    trainable = {p for p in model.parameters() if p.requires_grad}
    for layer in find_layers(model, layers).layers:
        fully_shard(layer, ignored_params=trainable)
    fully_shard(model, ignored_params=trainable)
    model.register_forward_hook(_reshard)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's base is sharded among ranks."""
    return isinstance(model, FSDPModule)


def average_trainable(model: nn.Module, **settings: Any) -> DistributedDataParallel:
    """Have DDP average the gradients of unsharded parameters, and ignore the others.

    Args:
        model: After `shard_base`; trainable parameters are on the rank's device.
        settings: For DistributedDataParallel.
    """
    sharded = {name for name, p in model.named_parameters() if not p.requires_grad}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(model, **settings)


def _reshard(model: nn.Module, *_: Any) -> None:
    """Reshard the weights outside of the layers after a pass without backward; FSDP2 keeps them for a backward.

    Else a rank that saves a checkpoint alone would reshard them, and alone gather them again: a deadlock.
    """
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        model.reshard()


def _check(model: nn.Module) -> None:
    """Refuse weights that cannot be sharded."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise UnsupportedError("the model's weights are sharded already: load it unsharded, and call shard_base once")
    if any(not p.is_floating_point() for p in model.parameters()):
        raise UnsupportedError(
            "the model's weights are quantized, which FSDP2 cannot shard: load it without quantization"
        )
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedError(
            f"the model is on {', '.join(sorted(devices))}: load it without device_map, since every rank gets a shard"
        )
