"""Merging: one update out of those of several data owners, their weighted mean.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, arXiv
1602.05629 (FedAvg), weighs by the number of rows. With u_n = W_n − W what return n changes, and a_n its weight,
Σ a_n = 1:

    mean      u = Σ a_n u_n

Ours, not the paper's: all have the same weight unless the owner says otherwise, since a number of rows is the data
owner's word.

Symbols: u_n rows of `updates_NX`, a `weights`.
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
