r"""KL divergence of the tuned model from its base, on the base's most likely tokens and the rest of its mass.

At each position, p is the base's distribution of the next token and q that of the tuned model. With K the k most
likely tokens of the base, and p_r = 1 − Σ_{v∈K} p_v, q_r = 1 − Σ_{v∈K} q_v the mass of all others,

    KL(p ‖ q) ≥ Σ_{v∈K} p_v (log p_v − log q_v) + p_r (log p_r − log q_r)

with equality for k = V, or if q is proportional to p outside of K. The right side is what `divergence` computes. A
position then takes 2 k numbers of memory instead of V.

Shapes: N positions, V vocabulary size, k tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Reference(NamedTuple):
    """The base's distribution at some positions."""

    tokens_Nk: Tensor  # int64, its most likely tokens
    log_Nk: Tensor  # their log-probabilities, in float32, or in float64 if the logits are
    rest_N: Tensor  # log-probability of all other tokens; −∞ if there are none


def reference(logits_NV: Tensor, count: int) -> Reference:
    """The `count` most likely tokens of each position, or all of them, and the mass of the rest.

    Args:
        logits_NV: (N, V) logits of the base, any floating dtype.
        count: k, at least 1.
    """
    tokens_Nk = logits_NV.topk(min(count, logits_NV.shape[1]), dim=1).indices
    return Reference(tokens_Nk, *_parts(logits_NV, tokens_Nk))


def divergence(logits_NV: Tensor, base: Reference) -> Tensor:
    """KL(base ‖ model) at each position, over the base's tokens and the rest; (N,) nats.

    Args:
        logits_NV: (N, V) logits of the model, any floating dtype.
        base: The base's distribution at the same positions.

    Example:
        >>> base = reference(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), count=2)
        >>> divergence(torch.tensor([[0.0, 0.0, 0.0, 0.0]]), base)
        tensor([0.])
    """
    log_Nk, rest_N = _parts(logits_NV, base.tokens_Nk)
    sums_N = (base.log_Nk.exp() * (base.log_Nk - log_Nk)).sum(1)
    if base.tokens_Nk.shape[1] == logits_NV.shape[1]:
        return sums_N
    return sums_N + base.rest_N.exp() * (base.rest_N - rest_N)


def _parts(logits_NV: Tensor, tokens_Nk: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of some tokens, and of all others together."""
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    log_sum_N = wide_NV.logsumexp(1)
    # not 1 − Σ q: beside a sum near 1, a small rest has no digits
    others_NV = wide_NV.scatter(1, tokens_Nk, -torch.inf)
    rest_N = others_NV.logsumexp(1) - log_sum_N if tokens_Nk.shape[1] < wide_NV.shape[1] else log_sum_N - torch.inf
    return wide_NV.gather(1, tokens_Nk) - log_sum_N[:, None], rest_N
