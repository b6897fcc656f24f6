"""What siftune needs of torch.distributed; the only file that touches it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist


def world_size() -> int:
    """Number of ranks; 1 where no process group is set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this rank; 0 where no process group is set up."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sum each of `tensors` over the ranks, in one exchange; they must have the same shapes on each of them."""
    if world_size() == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat, [t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def columns_of_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Columns of all ranks side by side, in the order of the ranks, which may have different numbers of them.

    Args:
        values: (U, n) float64, on the CPU; U the same on all ranks.
        device: Device of the model: NCCL exchanges what is there only.

    Returns:
        (U, sum of n over the ranks) float64, on the CPU.
    """
    if world_size() == 1:
        return values
    own = torch.tensor(values.shape[1], device=device)
    counts = [torch.zeros_like(own) for _ in range(world_size())]
    dist.all_gather(counts, own)
    widest = int(torch.stack(counts).max())
    sent = nn.functional.pad(values, (0, widest - values.shape[1])).to(device)
    parts = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(parts, sent)
    return torch.cat([part[:, : int(n)] for part, n in zip(parts, counts, strict=True)], 1).cpu()


def mean_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Mean of `values` over the ranks, the same bits on each of them.

    Args:
        values: Any shape, float64.
        device: Device of the model: NCCL reduces there only.

    Returns:
        The mean, on the CPU, float64.
    """
    if world_size() == 1:
        return values
    total = values.to(device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    dist.all_reduce(total)
    return (total / world_size()).to(device="cpu", dtype=torch.float64)
