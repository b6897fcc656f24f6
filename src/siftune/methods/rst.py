"""Layer selection without scores, to compare with.

RST, random sparse tuning, is the ablation in the IST paper (arXiv 2410.11772): the same number of layers trains
in a step, drawn uniformly.
"""

import torch
from torch import Tensor

from siftune.methods.ist.maths import draw_layers, share


def draw_uniform(layers: int, active: float, generator: torch.Generator) -> Tensor:
    """Draw max(1, ⌊active·layers⌋) layers uniformly, without replacement; (N,) int64, ascending."""
    return draw_layers(torch.zeros(layers, dtype=torch.float64), share(active, layers), generator)
