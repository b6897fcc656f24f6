"""Merging: one update out of those of several data owners, of whom one may be careless or hostile.

With u_n = W_n − W what return n changes, and a_n its weight, Σ a_n = 1:

    mean      u = Σ a_n u_n
    trimmed   u_c = the mean of u_1c … u_Nc without the k largest and the k smallest, k = max(1, ⌊β N⌋)

- The mean is that of FedAvg: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
  Data", AISTATS 2017, arXiv 1602.05629, which weighs by the number of rows.
- The trimmed mean, every coordinate c by itself: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal
  Statistical Rates", ICML 2018, arXiv 1803.01498.

Ours, not the papers': all have the same weight unless the owner says otherwise, since a number of rows is the data
owner's word. At least one return is trimmed at either end.

Symbols: u_n rows of `updates_NX`, a `weights`, β `share`, k `trimmed_count`.
Shapes: N returns, X any shape of a tensor.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def shares(weights: Sequence[float]) -> list[float]:
    """Weights, any finite numbers above 0, brought to a sum of 1."""
    largest = max(weights)  # numbers may be so large that their sum is none
    total = math.fsum(weight / largest for weight in weights)
    return [weight / largest / total for weight in weights]


def mean(updates_NX: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted mean.

    Args:
        updates_NX: (N, …).
        weights: N numbers above 0, of a sum of 1.

    Returns:
        (…), in the dtype of the updates.
    """
    merged_X: Tensor = torch.tensordot(updates_NX.new_tensor(weights), updates_NX, dims=1)
    return merged_X


def trimmed_count(count: int, share: float) -> int:
    """k: how many of `count` values are dropped at either end; at least 1, and fewer than half."""
    return min(max(1, math.floor(share * count + 1e-9)), (count - 1) // 2)


def trimmed_mean(updates_NX: Tensor, share: float) -> Tensor:
    """The mean of what is left in every coordinate without the largest and the smallest values.

    Args:
        updates_NX: (N, …), N at least 3.
        share: β, in (0, 0.5).

    Returns:
        (…), in the dtype of the updates.
    """
    count = len(updates_NX)
    dropped = trimmed_count(count, share)
    return updates_NX.sort(0).values[dropped : count - dropped].mean(0)
