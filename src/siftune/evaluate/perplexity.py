"""Perplexity of completions, and the log-likelihood per row on which it and multiple choice rest.

A row is a pair (input_ids, labels) of equally long lists. `labels` repeats the token ids that count and holds
-100 elsewhere, as in training; position t is predicted from the positions before t, so a label at position 0
can't be predicted and doesn't count.

    nll_i = −Σ_{t: label} ln p(x_t | x_<t)        ppl = exp(Σ_i nll_i / Σ_i tokens_i)

Shapes: B rows of a batch, T positions, N predicted positions of a batch, V vocabulary size, R all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from siftune.base.errors import DataError
from siftune.evaluate.batching import by_length, model_device
from siftune.models.loss import IGNORED, cross_entropy, logits_at
from siftune.models.modules import evaluating

TokenRow = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class PerplexityResult:
    """Negative log-likelihood per row, in nats.

    Attributes:
        nll: (R,) float64, summed over the row's labelled tokens.
        tokens: (R,) int64, how many labelled tokens the row has.
    """

    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]


def perplexity(model: nn.Module, rows: Sequence[TokenRow], batch_size: int = 16) -> PerplexityResult:
    """Measure how well the model predicts the labelled tokens.

    Args:
        model: A causal language model, PEFT-wrapped or not; it's put into eval mode and back.
        rows: Pairs (input_ids, labels) of equally long lists of token ids, -100 where nothing counts.
        batch_size: Rows per forward pass; it changes speed and memory, not the result.

    Returns:
        The negative log-likelihood and number of tokens per row, in the order of `rows`.

    Raises:
        DataError: A row's lists differ in length, or no row has a label that can be predicted.
    """
    result = row_nll(model, rows, batch_size)
    if not result.tokens.sum():
        raise DataError(
            f"none of the {len(rows)} rows has a labelled token after its first, so there is no perplexity. "
            "Give rows with a completion."
        )
    return result


def row_nll(model: nn.Module, rows: Sequence[TokenRow], batch_size: int = 16) -> PerplexityResult:
    """Compute the negative log-likelihood of each row's labelled tokens; rows without any give 0.

    Arguments and errors are those of `perplexity`, but nothing has to be labelled.
    """
    tokens = np.array([_count_labels(i, *row) for i, row in enumerate(rows)], dtype=np.int64)
    nll = np.zeros(len(rows), dtype=np.float64)
    labelled = np.flatnonzero(tokens).tolist()
    with evaluating(model):
        for batch in by_length([len(rows[i][0]) for i in labelled], batch_size):
            chosen = [labelled[i] for i in batch]
            nll[chosen] = _batch_nll(model, [rows[i] for i in chosen])
    return PerplexityResult(nll, tokens)


def _count_labels(index: int, ids: Sequence[int], labels: Sequence[int]) -> int:
    """Count the labels that can be predicted: all but the one at position 0."""
    if len(ids) != len(labels):
        raise DataError(f"row {index}: {len(ids)} input ids but {len(labels)} labels; give lists of one length")
    return sum(label != IGNORED for label in labels[1:])


def _batch_nll(model: nn.Module, rows: Sequence[TokenRow]) -> NDArray[np.float64]:
    """Negative log-likelihood per row of one batch: (B,) float64."""
    device = model_device(model)
    # Position t predicts token t + 1: drop the last input and the first label instead of shifting logits.
    ids_BT = _pad([ids[:-1] for ids, _ in rows], 0).to(device)
    labels_BT = _pad([labels[1:] for _, labels in rows], IGNORED).to(device)
    seen_BT = _pad([[1] * (len(ids) - 1) for ids, _ in rows], 0).to(device)
    mask_BT = labels_BT != IGNORED
    with logits_at(model, mask_BT):
        logits_NV = model(input_ids=ids_BT, attention_mask=seen_BT, use_cache=False).logits[0]
    nll_N = cross_entropy(logits_NV, labels_BT[mask_BT].to(logits_NV.device)).cpu().double()
    row_N = mask_BT.nonzero()[:, 0].cpu()
    sums_B = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row_N, nll_N)
    return np.asarray(sums_B.numpy())


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Right-pad lists of ids to one length: (B, T) int64."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)
