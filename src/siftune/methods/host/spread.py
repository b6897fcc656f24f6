"""Parallelism of a Trainer: DDP around a sharded base, and refusal of wrappers that selection does not support."""

import os
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from siftune.base.errors import UnsupportedError
from siftune.engine.sharding import average_trainable, is_sharded

_SHARDS = "shards the adapters that selection works on"
_INSTEAD = (
    "turn it off there, and call siftune.shard_base(model) before making the Trainer: it shards the base by FSDP2 and "
    "keeps the adapters unsharded; in siftune train, that is --sharding fsdp"
)
# sizes of a transformers DistributedConfig or an accelerate ParallelismConfig -> their meaning
_SPLITS = {
    "tp_size": "a tensor-parallel plan",
    "pp_size": "a pipeline",
    "ep_size": "expert parallelism",
    "cp_size": "context parallelism",
    "sp_size": "sequence parallelism",
}


def average_adapters(trainer: Trainer) -> None:
    """Put DDP around the unsharded part of a Trainer's model if `shard_base` has sharded it; else do nothing.

    accelerate's own way to DDP refuses a model with sharded weights.

    Raises:
        UnsupportedError: The Trainer would compile the model, or see `refuse_wrappers`.
    """
    refuse_wrappers(trainer.args, trainer.model, getattr(trainer.accelerator, "parallelism_config", None))
    if not is_sharded(trainer.model) or trainer.model_wrapped is not trainer.model:
        return
    if trainer.args.torch_compile:
        raise UnsupportedError("torch_compile does not support a sharded base: leave one of them out")
    model = trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)  # autocast if enabled
    trainer.model_wrapped = average_trainable(model, **trainer.accelerator.ddp_handler.to_kwargs())


def refuse_wrappers(args: TrainingArguments, model: nn.Module, plan: Any = None) -> None:
    """Refuse wrappers that hold the adapters elsewhere, or a part of them only, while a layer runs.

    Args:
        args: Of a Trainer.
        model: Its model.
        plan: accelerate's ParallelismConfig, if the Trainer has one.

    Raises:
        UnsupportedError: There is such a wrapper; the message names it.
    """
    if _is_launched("fsdp"):
        raise UnsupportedError(f"accelerate's config has fsdp on, which {_SHARDS}: {_INSTEAD}")
    if getattr(args, "fsdp", None):
        raise UnsupportedError(f"the Trainer's argument fsdp {_SHARDS}: {_INSTEAD}")
    if args.n_gpu > 1:
        raise UnsupportedError(
            f"the Trainer spreads every batch over {args.n_gpu} GPUs by nn.DataParallel, whose copies of the model "
            "selection cannot reach: start the script with torchrun or accelerate launch for DDP, or show it one GPU "
            "by CUDA_VISIBLE_DEVICES=0"
        )
    for name, size in _splits(plan, getattr(getattr(model, "config", None), "distributed_config", None)):
        raise UnsupportedError(
            f"the model is split by {_SPLITS[name]} ({name} {size}), so that no rank sees a complete layer or a row's "
            "gradient: train it by DDP; if it is too large for one device, use siftune.shard_base(model) or device_map"
        )


def refuse_launched() -> None:
    """Refuse FSDP or DeepSpeed of accelerate's config in siftune's own training.

    Raises:
        UnsupportedError: One of them is on.
    """
    for name in ("fsdp", "deepspeed"):
        if _is_launched(name):
            raise UnsupportedError(
                f"accelerate's config has {name} on, which siftune train does not support: turn it off there, and "
                "shard the base by --sharding fsdp"
            )


def _is_launched(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true"


def _splits(*plans: Any) -> Iterator[tuple[str, int]]:
    """Kinds of splitting in parallelism plans, and the number of parts of each."""
    for plan in plans:
        for name in _SPLITS:
            size = (plan.get(name) if isinstance(plan, dict) else getattr(plan, name, None)) or 1
            if size > 1:
                yield name, size
