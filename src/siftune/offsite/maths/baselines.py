"""Emulators without curvature, to compare GradOT with: layer drop, and SVD with FLAP.

**Layer drop** — offsite-tuning, "Transfer learning without full model", arXiv 2302.04870. Of the middle's L layers,
K evenly spaced ones stay, both ends among them: layer round(i (L−1)/(K−1)) for i = 0 … K−1.
Ours: K = 1 keeps the one in the middle, K = 0 none.

**FLAP** — "Fluctuation-based adaptive structured pruning for large language models", AAAI 2024, arXiv 2312.11983.
For a matrix W that writes from channels with activations x, channel j matters as much as it fluctuates, and its mean
goes into a bias:

    score_j = 1/(N−1) Σ_n (x_nj − x̄_j)² · ‖W[:, j]‖²         bias = Σ_{j dropped} x̄_j W[:, j]

Ours: N counts tokens; every layer keeps as many channels, where the paper compares standardised scores across layers.

**SVD** — the largest singular values of a matrix, in the form of `drd.canonical`.

Shapes: L layers, K kept, N tokens, C channels, O outputs, I inputs, R rank.
"""

import torch
from torch import Tensor

from siftune.base.errors import RecipeError
from siftune.base.numerics import widened
from siftune.offsite.maths.drd import canonical


def uniform_layers(count: int, kept: int) -> list[int]:
    """Choose evenly spaced layers.

    Args:
        count: L, the layers of the middle.
        kept: K, how many of them stay, from 0.

    Returns:
        K numbers from 0 to L−1, ascending.

    Raises:
        RecipeError: K is not from 0 to L.
    """
    if not 0 <= kept <= count:
        raise RecipeError(f"{kept} of {count} middle layers would stay; give a number from 0 to {count}.")
    if kept == 1:
        return [count // 2]
    return [round(i * ((count - 1) / (kept - 1))) for i in range(kept)]


def flap_scores(x_NC: Tensor, weight_OC: Tensor) -> Tensor:
    """Score channels by how much what they write fluctuates; high ones should stay.

    Args:
        x_NC: (N, C) activations of the channels over the real tokens.
        weight_OC: The matrix that writes.

    Returns:
        (C,) scores in float32, or float64 where the activations are.
    """
    x_NC = widened(x_NC)
    fluctuation_C = (x_NC - x_NC.mean(0)).square().sum(0) / max(len(x_NC) - 1, 1)
    return fluctuation_C * weight_OC.to(x_NC.dtype).square().sum(0)


def flap_bias(x_NC: Tensor, weight_OC: Tensor, dropped: Tensor) -> Tensor:
    """The mean output of dropped channels, to add to the bias.

    Args:
        x_NC: (N, C) activations of all channels over the real tokens.
        weight_OC: The matrix that writes, before channels are dropped.
        dropped: Numbers of the dropped channels.

    Returns:
        (O,) in float32, or float64 where the activations are.
    """
    mean_C = widened(x_NC).mean(0)
    return weight_OC.to(mean_C.dtype)[:, dropped] @ mean_C[dropped]


def svd_factor(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix by one of lower rank; (O, R) and (R, I) in float32, in canonical form."""
    left_OK, size_K, right_KI = torch.linalg.svd(widened(weight_OI), full_matrices=False)
    up_OR, down_RI = canonical(left_OK[:, :rank] * size_K[:rank], right_KI[:rank])
    return up_OR.float(), down_RI.float()
