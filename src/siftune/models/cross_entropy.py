"""Cross entropy over a large vocabulary, some labels at a time.

torch's keeps a copy of the logits in float32, their log-softmax and the gradients of both, each as large as a batch's
labels times the vocabulary, where training needs most memory. Here what is in float32 is of a few labels at a time,
forward and backward, and the gradient is written in the logits' dtype.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# logits at a time, of which there are two or three copies in float32: what fits a processor's cache; 0.5 GB on a GPU
_AT_A_TIME = {"cpu": 2**18}
_ELSEWHERE = 2**27


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """−log softmax at each label, in float32, or in float64 where the logits are.

    Args:
        logits_NV: (N, V), of any floating dtype.
        targets_N: (N,) int64, from 0 to V − 1.

    Returns:
        (N,), of that dtype; its gradient can be formed once.

    Example:
        >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor([0.6931])
    """
    losses: Tensor = _CrossEntropy.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        # largest logits are kept apart from the sums: both in one number would cost what is small beside them
        wide = _wide(logits_NV)
        largest_N = logits_NV.amax(1).to(wide)
        parts = _parts(logits_NV, largest_N)
        logsums_N = torch.cat(
            [(logits_nV.to(wide) - largest_n[:, None]).exp_().sum(1).log_() for logits_nV, largest_n in parts]
        )
        ctx.save_for_backward(logits_NV, targets_N, largest_N, logsums_N)
        return logsums_N - (logits_NV.gather(1, targets_N[:, None])[:, 0].to(wide) - largest_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N, largest_N, logsums_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        parts = _parts(grad_NV, logits_NV, targets_N, largest_N, logsums_N, grad_N)
        for written_nV, logits_nV, targets_n, largest_n, logsums_n, grad_n in parts:
            share_nV = (logits_nV.to(_wide(logits_NV)) - largest_n[:, None]).sub_(logsums_n[:, None]).exp_()
            share_nV.scatter_add_(1, targets_n[:, None], share_nV.new_full((len(targets_n), 1), -1.0))
            written_nV.copy_(share_nV.mul_(grad_n[:, None]))
        return grad_NV, None


def _wide(logits_NV: Tensor) -> torch.dtype:
    return torch.promote_types(logits_NV.dtype, torch.float32)


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same labels of all tensors, some at a time; the first is (N, V)."""
    at_a_time = _AT_A_TIME.get(tensors[0].device.type, _ELSEWHERE)
    labels = max(1, at_a_time // max(1, tensors[0].shape[1]))
    return zip(*(torch.split(tensor, labels) for tensor in tensors), strict=True)
