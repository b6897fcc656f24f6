"""Attention over short rows on processors, where torch's fused kernel is slow.

torch's kernel iterates over blocks of keys to avoid a matrix of scores. For rows of a hundred tokens that matrix is
small. Two plain products, with the queries that share a key side by side, take a quarter of the kernel's time in
bfloat16, forward and backward.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# the longest rows for which these products are faster on processors, as measured: float32 has no gain, and scores in
# float16 could overflow
_LONGEST = {torch.bfloat16: 256}


@contextmanager
def short_rows() -> Iterator[None]:
    """Use these products in models with transformers' attention `sdpa` if they are faster: in bfloat16.

    The results are those of `sdpa` up to rounding: scores are rounded, as by `eager`. All models of the process change
    inside the block. A backward pass belongs inside too, since checkpointing runs layers again. If another package has
    replaced `sdpa`, nothing changes.

    Example:
        >>> with short_rows():
        ...     loss = model(**batch).loss
        ...     loss.backward()
    """
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attention
    try:
        yield
    finally:
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is _attention:  # not if another package has replaced it meanwhile
            del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """Compute `sdpa`, for short rows by `_products`; query (B, H, T, D), key and value (B, K, S, D)."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # sdpa adds a bias and refuses a cap
    unsupported = any(options.get(name) is not None for name in ("position_bias", "softcap"))
    if unsupported or not _fits(query, key, value, attention_mask, causal):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    scaling = options.get("scaling")
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    mask = _causal(query) if attention_mask is None and causal else attention_mask
    return _products(query, key, value, mask, scale, options.get("dropout", 0.0)), None


def _fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether `_products` is faster and equivalent."""
    (rows, heads, length, _), (keyed, own, keys, _) = query.shape, key.shape
    short = query.device.type == "cpu" and 1 < length <= keys <= _LONGEST.get(query.dtype, 0)
    square = length == keys if mask is None and causal else True  # else sdpa leaves keys out
    matching = rows == keyed and heads % own == 0 and key.shape[:3] == value.shape[:3]
    return short and square and matching and (mask is None or mask.dtype == torch.bool)


def _causal(query: Tensor) -> Tensor:
    length = query.shape[2]
    return torch.ones(length, length, dtype=torch.bool, device=query.device).tril_()


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
    """softmax(scale · q kᵀ) v over the keys that a query sees, (B, T, H, D); 0 for a query that sees none.

    `mask` is boolean, true where a query sees a key; None: all are seen.
    """
    rows, heads, length, _ = query.shape
    own, keys = key.shape[1], key.shape[2]  # heads of keys, each for heads / own heads of queries, side by side
    shape = (rows * own, heads // own * length)
    scores = torch.bmm((query * scale).reshape(*shape, -1), key.reshape(rows * own, keys, -1).transpose(1, 2))
    if mask is not None:
        with torch.no_grad():  # weights of 0 have no gradient, so no copy of the scores is needed
            scores.view(rows, heads, length, keys).masked_fill_(~mask, torch.finfo(scores.dtype).min)
    weights = nn.functional.dropout(scores.softmax(-1), dropout)
    output = torch.bmm(weights, value.reshape(rows * own, keys, -1)).view(rows, heads, length, -1)
    if mask is not None and mask.dim() > 2:  # with the causal mask each query sees itself
        output = output.masked_fill(~mask.any(-1, keepdim=True), 0)
    return output.transpose(1, 2).contiguous()
