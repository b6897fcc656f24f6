"""The loss of every row of a batch, from what a training step's own forward pass returned.

Shapes: B rows, T positions, N label tokens in row-major order, V vocabulary size.
"""

from typing import Any

import torch
from torch import Tensor, nn

from siftune.base.errors import UnsupportedError
from siftune.models.loss import label_positions, next_labels

_FUSED = ("log_probs", "label_mask")
_AT_ONCE = 2**24  # logits that are worked on at a time: 64 MB in float32


def by_row(losses_N: Tensor, labels_BT: Tensor) -> Tensor:
    """Add up the losses of label tokens by row.

    Args:
        losses_N: (N,) losses, those of `label_positions(labels_BT)`.
        labels_BT: (B, T) labels.

    Returns:
        (2, B) float32: each row's mean loss, NaN where it has no label; and its label tokens.
    """
    row_N = label_positions(labels_BT).nonzero()[:, 0].to(losses_N.device)
    wide_N = losses_N.detach().float()
    sums_2B = wide_N.new_zeros(2, len(labels_BT))
    sums_2B.index_add_(1, row_N, torch.stack([wide_N, torch.ones_like(wide_N)]))
    return torch.stack([sums_2B[0] / sums_2B[1], sums_2B[1]])


@torch.no_grad()
def row_losses(output: Any, labels_BT: Tensor) -> Tensor:
    """The loss of every row, as `by_row` has it, from a causal language model's output.

    Args:
        output: Has `logits`, (B, T, V), or where they were computed at the labels alone (1, N, V), or one more as
            `LabelLogits` has them; or `log_probs` and `label_mask`, (B, T − 1) both, or (1, N), as TRL's SFTTrainer
            makes them in the place of logits.
        labels_BT: (B, T) int64, -100 where nothing is learned.

    Raises:
        UnsupportedError: It has neither.
    """
    positions_BT = label_positions(labels_BT)
    count, log_probs, mask = int(positions_BT.sum()), *(getattr(output, name, None) for name in _FUSED)
    if log_probs is not None and mask is not None and len(log_probs) == len(labels_BT):
        sums_2B = torch.stack([-log_probs.detach().float().mul(mask).sum(1), mask.sum(1).float()])
        return torch.stack([sums_2B[0] / sums_2B[1], sums_2B[1]])
    if log_probs is not None and log_probs.shape == (1, count):
        return by_row(-log_probs.flatten(), labels_BT)
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim == 3:
        if logits.shape[:2] == labels_BT.shape:
            return by_row(_losses(logits, positions_BT.flatten().nonzero()[:, 0], labels_BT), labels_BT)
        if logits.shape[:2] in ((1, count), (1, count + 1)):
            return by_row(_losses(logits, torch.arange(count), labels_BT), labels_BT)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else "no logits"
    raise UnsupportedError(
        f"labels are {tuple(labels_BT.shape)} and the model's output has {found}, from which losses of rows cannot be "
        "told: turn off what fuses the loss into the model (such as use_liger_kernel), or leave RowRecord or Trim out"
    )


def _losses(logits: Tensor, where_N: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross entropy at some positions, (N,), some at a time, so that no second set of logits is in memory."""
    flat, targets_N = logits.detach().flatten(0, 1), next_labels(labels_BT).to(logits.device)
    size = max(1, _AT_ONCE // flat.shape[1])
    parts = zip(torch.split(where_N.to(flat.device), size), torch.split(targets_N, size), strict=True)
    losses = [nn.functional.cross_entropy(flat[at].float(), wanted, reduction="none") for at, wanted in parts]
    return torch.cat(losses) if losses else flat.new_zeros(0, dtype=torch.float32)
