"""The loss of a private run: a sum over rows, in which no row's share depends on another row.

A mean over the tokens of a batch will not do: how much a row weighs in it depends on how long the others are, so that
one row changes the gradients of all, and clipping bounds nothing.
"""

from torch import Tensor

from siftune.models.loss import cross_entropy, label_positions, next_labels


def row_loss(logits_1NV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum over the rows of each row's mean token loss, in float32.

    Args:
        logits_1NV: (1, N, V) logits at `label_positions(labels_BT)`, any floating dtype.
        labels_BT: (B, T) int64, -100 where nothing is learned.

    Returns:
        Scalar float32, or float64 where the logits are; a row without labels adds nothing.
    """
    counts_B = label_positions(labels_BT).sum(1)
    losses_N = cross_entropy(logits_1NV.squeeze(0), next_labels(labels_BT).to(logits_1NV.device))
    weights_N = counts_B.to(losses_N.dtype).reciprocal().repeat_interleave(counts_B)
    return (losses_N * weights_N.to(losses_N.device)).sum()
