"""Merging: one update out of those of several data owners, of whom one may be careless or hostile.

With u_n = W_n − W what return n changes, and a_n its weight, Σ a_n = 1:

    clip      u_n ← s_n u_n,   s_n = min(1, X m / ‖u_n‖),   m the median of ‖u_1‖ … ‖u_N‖
    mean      u = Σ a_n u_n
    trimmed   u_c = the mean of u_1c … u_Nc without the k largest and the k smallest, k = max(1, ⌊β N⌋)

- The mean is that of FedAvg: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
  Data", AISTATS 2017, arXiv 1602.05629, which weighs by the number of rows.
- The trimmed mean, every coordinate c by itself: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal
  Statistical Rates", ICML 2018, arXiv 1803.01498.
- Bounded norms: Sun et al., "Can You Really Backdoor Federated Learning?", 2019, arXiv 1911.07963, with a bound that is
  chosen beforehand.

Ours, not the papers': all have the same weight unless the owner says otherwise, since a number of rows is the data
owner's word. The bound is a multiple of the median, since nobody knows beforehand how far tuning moves; of an even
number the lower of the two in the middle, so that fewer than half cannot raise it. One factor s_n for all of a return,
from the norm over all its tensors: a factor for each tensor would turn the update, and what a single tensor may move by
is limited elsewhere (`exchange.updates`). At least one return is trimmed at either end. Clipping comes before trimming.

Symbols: u_n rows of `updates_NX`, a `weights`, s `clip_factors`, X `multiple`, β `share`, k `trimmed_count`.
Shapes: N returns, X any shape of a tensor.
"""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor


def clip_factors(norms: Sequence[float], multiple: float) -> list[float]:
    """Factors that scale updates down to a multiple of the median norm.

    Args:
        norms: ‖u_n‖ of every update; finite, 0 or more.
        multiple: X, above 0.

    Returns:
        s_n, in (0, 1], or 0 where the median is 0 and the update is not.
    """
    bound = multiple * statistics.median_low(norms)
    return [1.0 if norm <= bound else bound / norm for norm in norms]


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
    """k: how many of `count` values are dropped at either end; at least 1."""
    return max(1, math.floor(share * count + 1e-9))


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
