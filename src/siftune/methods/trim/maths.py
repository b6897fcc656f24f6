"""Trim: which rows of a batch to follow by what they cost.

Keeping the rows of small loss is trimmed loss (Shen & Sanghavi, "Learning with Bad Training Data via Iterative Trimmed
Loss Minimization", ICML 2019, arXiv 1810.11874), within a batch as co-teaching has it (Han et al., NeurIPS 2018, arXiv
1804.06872). Keeping those of large loss is its opposite: what the model knows already is left out. Random rows are the
baseline of both at equal updates. With l_i the mean token loss of row i, K of B rows to be kept:

    small, large   the K rows of smallest, of largest l_i
    random         K rows, evenly
    gradient       (B/K) · Σ_{i kept} g_i

Ours: a batch chooses for itself, rather than all rows at once; a row's loss is the mean over its tokens, so that long
rows are not dear by their length; the factor B/K, by which a step is as long as one on all rows.

Symbols: B rows, K kept. l_i `losses_B`.
"""

import torch
from torch import Tensor


def choose(losses_B: Tensor, uniform_B: Tensor, count: int, which: str) -> Tensor:
    """Choose rows.

    Args:
        losses_B: (B,) mean token losses, NaN for rows without a label, which are taken only where there are too few.
        uniform_B: (B,) uniform numbers in [0, 1), for "random".
        count: K ≤ B.
        which: "small", "large" or "random".

    Returns:
        (K,) int64 row numbers, ascending.

    Example:
        >>> choose(torch.tensor([0.5, torch.nan, 0.1, 0.9]), torch.zeros(4), 2, "large")
        tensor([0, 3])
    """
    order_B = {"small": losses_B, "large": -losses_B, "random": uniform_B}[which]
    order_B = order_B.where(~losses_B.isnan(), torch.inf)
    return order_B.argsort(stable=True)[:count].sort().values


def factor(losses_B: Tensor, chosen_K: Tensor) -> Tensor:
    """B/K among the rows that have a label; a scalar in the dtype of the losses."""
    live_B = ~losses_B.isnan()
    return live_B.sum().to(losses_B.dtype) / live_B[chosen_K].sum().clamp_min(1)
