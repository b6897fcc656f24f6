"""torch.distributed for siftune: joining a launch, exchanges between ranks. The only file that uses it."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from siftune.base.environment import launch_size
from siftune.base.numerics import has_float64

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)  # other ranks wait while rank 0 fetches a model and tokenizes many rows


def join_launch() -> bool:
    """Join the other ranks of a launch by torchrun or accelerate, before a Trainer does so.

    Returns:
        Whether there are other ranks; then call `leave_launch` at the end.
    """
    if launch_size() == 1 or dist.is_initialized():
        return False
    from accelerate import PartialState

    PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
    return True


def let_go(trainer: Any) -> None:
    """Free a Trainer's DDP wrapper, which would keep the process group alive.

    Args:
        trainer: A transformers Trainer after training.
    """
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    gc.collect()


def leave_launch() -> None:
    """End the process group, if there is one: threads of gloo that outlive it abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def in_launch() -> Iterator[None]:
    """Join the other ranks for a block in which several trainings may come one after the other."""
    joined = join_launch()
    yield
    if joined:
        leave_launch()


def from_first(make: Callable[[], T]) -> T:
    """Have rank 0 make a picklable value, and send it to all ranks."""
    values = [make() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]  # type: ignore[return-value]


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Have rank 0 run the block before the others, which then read its files."""
    if rank():
        dist.barrier()
    yield
    if world_size() > 1 and not rank():
        dist.barrier()


def wait_for_all() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if in_group() else 1


def in_group() -> bool:
    """Whether there is a process group, even of this process alone: DDP and ZeRO then wait for every gradient."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this rank; 0 without a process group."""
    return dist.get_rank() if in_group() else 0


def columns_of_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Concatenate the columns of all ranks, in their order; ranks may have different numbers of columns.

    Args:
        values: (U, n) float64, on the CPU; U the same on all ranks.
        device: Device of the model, since NCCL exchanges tensors on it only.

    Returns:
        (U, sum of n over the ranks) float64, on the CPU.
    """
    if world_size() == 1:
        return values
    own = torch.tensor(values.shape[1], device=device)
    counts = [torch.zeros_like(own) for _ in range(world_size())]
    dist.all_gather(counts, own)
    widest = int(torch.stack(counts).max())
    padded = nn.functional.pad(values, (0, widest - values.shape[1]))
    sent = padded.to(torch.float64 if has_float64(device.type) else torch.float32).to(device)
    parts = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(parts, sent)
    return torch.cat([part[:, : int(n)] for part, n in zip(parts, counts, strict=True)], 1).cpu().double()


def mean_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Mean of `values` over the ranks, the same bits on each of them.

    Args:
        values: Any shape, float64.
        device: Device of the model, since NCCL reduces on it only.

    Returns:
        The mean, on the CPU, float64.
    """
    if world_size() == 1:
        return values
    total = values.to(torch.float64 if has_float64(device.type) else torch.float32).to(device)
    dist.all_reduce(total)
    return (total / world_size()).cpu().double()
