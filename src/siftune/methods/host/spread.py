"""How a Trainer spreads its model over processes and devices: what selection works with, and what it refuses."""

import os
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from siftune.base.errors import UnsupportedError
from siftune.engine.sharding import average_whole, is_sharded

_SHARDS = "shards the adapters that selection works on."
_INSTEAD = (
    "Leave it out there, and call siftune.shard_base(model) before the Trainer is made: it divides the base by FSDP2 "
    "and leaves the adapters whole; in siftune train, that is --sharding fsdp"
)
# sizes of a transformers DistributedConfig or an accelerate ParallelismConfig -> what they stand for
_SPLITS = {
    "tp_size": "a tensor-parallel plan",
    "pp_size": "a pipeline",
    "ep_size": "expert parallelism",
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
}


def average_adapters(trainer: Trainer) -> None:
    """Where `shard_base` has divided a Trainer's model, put DDP around what is whole; else do nothing.

    accelerate's own way to DDP refuses a model any of whose weights are divided.

    Raises:
        UnsupportedError: The Trainer would compile the model, or see `refuse_wrappers`.
    """
    refuse_wrappers(trainer.args, trainer.model, getattr(trainer.accelerator, "parallelism_config", None))
    if not is_sharded(trainer.model) or trainer.model_wrapped is not trainer.model:
        return
    if trainer.args.torch_compile:
        raise UnsupportedError("torch_compile does not go with a base that is sharded: leave one of them out")
    model = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)  # autocast, where it is asked for
    trainer.model_wrapped = average_whole(model, **trainer.accelerator.ddp_handler.to_kwargs())


def refuse_wrappers(args: TrainingArguments, model: nn.Module, plan: Any = None) -> None:
    """Refuse what holds the adapters elsewhere, or a part of them only, while a layer runs.

    Args:
        args: Of a Trainer.
        model: Its model.
        plan: accelerate's ParallelismConfig, where the Trainer has one.

    Raises:
        UnsupportedError: Something does; the message names it.
    """
    if _is_launched("fsdp"):
        raise UnsupportedError(f"accelerate's config has fsdp on, which {_SHARDS} {_INSTEAD}.")
    if getattr(args, "fsdp", None):
        raise UnsupportedError(f"The Trainer's argument fsdp {_SHARDS} {_INSTEAD}.")
    if args.n_gpu > 1:
        raise UnsupportedError(
            f"The Trainer spreads every batch over {args.n_gpu} GPUs by nn.DataParallel, whose copies of the model are "
            "out of reach of selection. Start the script with torchrun or accelerate launch for DDP, or show it one "
            "GPU: CUDA_VISIBLE_DEVICES=0."
        )
    for name, size in _splits(plan, getattr(getattr(model, "config", None), "distributed_config", None)):
        raise UnsupportedError(
            f"The model is split by {_SPLITS[name]} ({name} {size}), so that a rank sees a part of a layer or of the "
            "layers, and no rank a row's gradient. Train it by DDP, or, where it is too large for one device, divide "
            "it by siftune.shard_base(model) or device_map."
        )


def refuse_launched() -> None:
    """Refuse in siftune's own training what accelerate's launcher has turned on by its config.

    Raises:
        UnsupportedError: It is FSDP or DeepSpeed.
    """
    for name in ("fsdp", "deepspeed"):
        if _is_launched(name):
            raise UnsupportedError(
                f"accelerate's config has {name} on, by which siftune train does not go: leave it out there, and "
                "divide the base by --sharding fsdp"
            )


def _is_launched(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true"


def _splits(*plans: Any) -> Iterator[tuple[str, int]]:
    """Ways in which plans split the work of one pass over ranks, and into how many parts."""
    for plan in plans:
        for name in _SPLITS:
            size = (plan.get(name) if isinstance(plan, dict) else getattr(plan, name, None)) or 1
            if size > 1:
                yield name, size
