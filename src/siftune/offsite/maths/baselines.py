"""Emulators without curvature, to compare GradOT with: layer drop, CRaSh, and SVD with FLAP.

**Layer drop** — offsite-tuning, "Transfer learning without full model", arXiv 2302.04870. Of the middle's L layers,
K evenly spaced ones stay, both ends among them: layer round(i (L−1)/(K−1)) for i = 0 … K−1.
Ours: K = 1 keeps the one in the middle, K = 0 none.

**CRaSh** — "Clustering, removing, and sharing enhance fine-tuning without full large language model", EMNLP 2023,
arXiv 2310.15477. Layers with similar outputs form clusters of neighbours; the one in the centre of a cluster stays
and the others take its weights. Clusters start as single layers; the two neighbouring clusters whose facing layers'
outputs have the highest linear CKA (Kornblith et al., ICML 2019, arXiv 1905.00414) become one, until K are left. The
similarity of two facing layers doesn't change as clusters grow, so this cuts at the K−1 lowest similarities. For
outputs X, Y of two layers, columns centred:

    CKA(X, Y) = ‖Xᵀ Y‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖)        (Frobenius norms)

Ours: a row of X is a token, where the authors' code pools those of a sequence into one; clusters are of the middle's
layers only; an output that doesn't vary is similar to nothing; of equal similarities the first merges first.

**FLAP** — "Fluctuation-based adaptive structured pruning for large language models", AAAI 2024, arXiv 2312.11983.
For a matrix W that writes from channels with activations x, channel j matters as much as it fluctuates, and its mean
goes into a bias:

    score_j = 1/(N−1) Σ_n (x_nj − x̄_j)² · ‖W[:, j]‖²         bias = Σ_{j dropped} x̄_j W[:, j]

Ours: N counts tokens; every layer keeps as many channels, where the paper compares standardised scores across layers.

**SVD** — the largest singular values of a matrix, in the form of `drd.canonical`.

Shapes: L layers, K kept, N tokens, F features, C channels, O outputs, I inputs, R rank.
"""

from collections.abc import Iterable
from itertools import pairwise

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
    _check_kept(kept, 0, count)
    if kept == 1:
        return [count // 2]
    return [round(i * ((count - 1) / (kept - 1))) for i in range(kept)]


def linear_cka(x_NF: Tensor, y_NF: Tensor) -> Tensor:
    """Similarity of two representations of the same tokens, from 0 to 1; a scalar in float64."""
    x_NF, y_NF = (rows - rows.mean(0) for rows in (widened(x_NF), widened(y_NF)))
    own_x, own_y, shared = (matrix.norm().cpu().double() for matrix in (x_NF.T @ x_NF, y_NF.T @ y_NF, x_NF.T @ y_NF))
    length = own_x * own_y
    alike: Tensor = shared.square() / torch.where(length == 0, 1.0, length)
    return alike


def neighbour_similarities(outputs: Iterable[Tensor]) -> Tensor:
    """CKA of every layer's output with the next one's.

    Args:
        outputs: (N, F) output of every layer, over the same real tokens; two at a time are looked at.

    Returns:
        (L − 1,) float64.
    """
    return torch.tensor([linear_cka(x_NF, y_NF).item() for x_NF, y_NF in pairwise(outputs)], dtype=torch.float64)


def crash_sources(similarities: Tensor, kept: int) -> list[int]:
    """Cluster neighbouring layers, and let each take the weights of its cluster's centre.

    Args:
        similarities: (L − 1,) of every layer with the next.
        kept: K, the number of clusters, from 1 to L.

    Returns:
        For every layer the number of the layer whose weights it takes; for a centre its own.

    Raises:
        RecipeError: K is not from 1 to L.
    """
    count = len(similarities) + 1
    _check_kept(kept, 1, count)
    cuts = similarities.argsort(descending=True, stable=True)[count - kept :] + 1
    ends = [0, *cuts.sort().values.tolist(), count]
    return [(start + end) // 2 for start, end in pairwise(ends) for _ in range(start, end)]


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


def _check_kept(kept: int, least: int, count: int) -> None:
    if not least <= kept <= count:
        raise RecipeError(f"{kept} of {count} middle layers would stay; give a number from {least} to {count}.")
