"""Cross entropy over the label positions, from logits that exist only there.

A causal LM spends a large share of its time and memory on logits of prompt and padding positions, which no loss looks
at. `label_positions` says where logits are needed, `models.heads.logits_at` makes the model compute those only, and
`token_loss` is the loss that the model would have returned.

Shapes: B rows, T positions, N label positions, V vocabulary size.
"""

from torch import Tensor, nn

from siftune.models.heads import IGNORED, label_positions, logits_at, next_labels


def token_loss(logits_1NV: Tensor, labels_BT: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Cross entropy in float32, summed over label positions and divided by their number.

    Args:
        logits_1NV: (1, N, V) logits at `label_positions(labels_BT)`, any floating dtype.
        labels_BT: (B, T) int64, -100 where nothing is learned.
        items: Divisor in place of N: the labels of all micro-batches of an optimizer step.

    Returns:
        Scalar float32; 0 where there is no label at all.
    """
    targets_N = next_labels(labels_BT).to(logits_1NV.device)
    total = nn.functional.cross_entropy(logits_1NV[0].float(), targets_N, reduction="sum")
    divisor = targets_N.numel() if items is None else items
    if isinstance(divisor, Tensor):
        return total / divisor.to(total.device).clamp_min(1)
    return total / max(1, divisor)


def difference_from_model(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, float]:
    """Compare this loss with the model's own on one row of a batch.

    The row with most labels is taken, so that the full logits of one row are all that it costs.

    Args:
        model: The model, in any mode; evaluated without gradient and without dropout by the caller.
        inputs: A batch with (B, T) `input_ids`, `attention_mask` and `labels`.

    Returns:
        The two losses: ours and the model's.
    """
    row = int((inputs["labels"] != IGNORED).sum(1).argmax())
    rows = inputs["labels"].shape[0]
    one = {k: v[row : row + 1] for k, v in inputs.items() if isinstance(v, Tensor) and v.shape[:1] == (rows,)}
    labels = one["labels"]
    with logits_at(model, label_positions(labels)):
        logits = model(**{k: v for k, v in one.items() if k != "labels"}).logits
    return float(token_loss(logits, labels)), float(model(**one).loss)
