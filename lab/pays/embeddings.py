"""Embeddings of rows by a language model, and their similarity.

A row's embedding is the mean of the last layer's hidden states over its tokens, prompt and completion; similarity is
the cosine. A row's score is its largest similarity to a known row, as in RDS+ (Ivison et al., "Large-Scale Data
Selection for Instruction Tuning", arXiv 2503.01807), or that to the mean of the known rows' embeddings.

Ours, not the paper's: tokens have equal weights, while RDS+ gives later ones more; a row's score depends on the nearest
known row alone, while RDS+ lets the known rows choose in turn.

Shapes: R rows, K known rows, H hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from siftune.base.errors import UnsupportedError
from siftune.base.numerics import widened
from siftune.data.batches import by_length
from siftune.models.modules import evaluating, model_device


def embed(model: nn.Module, data: Dataset, collate: Callable[[list[Any]], Any], batch_size: int = 64) -> Tensor:
    """Embed tokenised rows.

    Args:
        model: A causal language model without adapters; it is put into eval mode and back.
        data: Rows with `input_ids`, `labels` and `length`.
        collate: Makes a batch of them.
        batch_size: Rows per forward pass.

    Raises:
        UnsupportedError: The model does not tell what is below its head.

    Returns:
        (R, H), each of length 1, float32, or float64 where the model is.
    """
    parts: dict[int, Tensor] = {}
    body = getattr(model, str(model.base_model_prefix) or "-", None)  # without the head: no logits
    if body is None:
        raise UnsupportedError(
            f"{type(model).__name__} does not tell which module its head is on, so rows have no embedding"
        )
    with evaluating(model):
        for places in by_length(list(data["length"]), batch_size):
            batch = collate([data[place] for place in places])
            ids, seen = (batch[name].to(model_device(model)) for name in ("input_ids", "attention_mask"))
            states_BTH = widened(body(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state)
            seen_BT1 = seen.unsqueeze(2).to(states_BTH.dtype)
            mean_BH = (states_BTH * seen_BT1).sum(1) / seen_BT1.sum(1)
            parts |= dict(zip(places, nn.functional.normalize(mean_BH, dim=1).cpu(), strict=True))
    return torch.stack([parts[place] for place in range(len(data))])


def similarity(rows_RH: Tensor, known_KH: Tensor) -> Tensor:
    """Similarity of each row to the nearest known row; (R,), −1 to 1.

    Args:
        rows_RH: Embeddings, each of length 1.
        known_KH: Those of the known rows.

    Example:
        >>> rows, known = torch.eye(2), torch.tensor([[0.6, 0.8], [1.0, 0.0]])
        >>> similarity(rows, known)
        tensor([1.0000, 0.8000])
    """
    return (rows_RH @ known_KH.T).amax(1)


def most_alike(scores_R: Tensor, share: float) -> Sequence[int]:
    """Numbers of the share of the rows, at least one, with the highest scores; ascending, the first of equal ones."""
    count = max(1, round(share * len(scores_R)))
    kept: list[int] = scores_R.argsort(descending=True, stable=True)[:count].sort().values.tolist()
    return kept
