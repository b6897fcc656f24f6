"""Offline selection by embeddings: the rows of the pool that look most like the known rows.

A row's embedding is the mean of the last layer's hidden states over its tokens, prompt and completion, in the untrained
model; similarity is the cosine. A row's score is its largest similarity to a known row ("max"), as in RDS+ (Ivison et
al., arXiv 2503.01807, which weights later tokens more), or that to the mean of the known rows' embeddings ("mean").

Shapes: R rows, H hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from siftune.errors import RecipeError
from siftune.evaluate.batching import by_length, model_device
from siftune.models.modes import evaluating

Record = dict[str, Any]

SHARE = 0.25  # of the pool that is kept
_BATCH = 64


def embed(model: nn.Module, data: Any, collate: Any, batch_size: int = _BATCH) -> Tensor:
    """Embed tokenised rows; (R, H) float32, each of length 1."""
    parts: dict[int, Tensor] = {}
    body = getattr(model, model.base_model_prefix)  # without the head: no logits
    with evaluating(model):
        for places in by_length(list(data["length"]), batch_size):
            batch = {k: v.to(model_device(model)) for k, v in collate([data[place] for place in places]).items()}
            output = body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            seen_BT1 = batch["attention_mask"].unsqueeze(2).float()
            mean_BH = (output.last_hidden_state.float() * seen_BT1).sum(1) / seen_BT1.sum(1)
            parts |= dict(zip(places, nn.functional.normalize(mean_BH, dim=1), strict=True))
    return torch.stack([parts[place] for place in range(len(data))])


def similarity(pool_RH: Tensor, known_KH: Tensor, nearest: str) -> Tensor:
    """Score the rows of a pool by their embeddings; (R,).

    Raises:
        RecipeError: `nearest` is neither "max" nor "mean".
    """
    if nearest == "max":
        return (pool_RH @ known_KH.T).max(1).values
    if nearest == "mean":
        return pool_RH @ nn.functional.normalize(known_KH.mean(0), dim=0)
    raise RecipeError(f"nearest is {nearest!r}, but must be max or mean")


def retrieve(rows: Sequence[Record], scores_R: Tensor) -> list[Record]:
    """The best quarter of the rows, in their order."""
    count = max(1, round(SHARE * len(rows)))
    return [rows[place] for place in scores_R.topk(count).indices.sort().values.tolist()]
