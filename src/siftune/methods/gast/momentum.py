"""GAST's support mode "momentum" (ours): a running mean of the gradients of earlier steps' samples."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from siftune.base.numerics import all_finite
from siftune.engine.gate import is_active
from siftune.engine.groups import LayerGroup
from siftune.engine.ranks import sum_over_ranks
from siftune.methods.drivers.support import Gradients


def moved_mean(
    mean: Mapping[nn.Parameter, Tensor], sums: Gradients, groups: Sequence[LayerGroup], decay: float
) -> Gradients:
    """Take a step's gradients, on all ranks, into the active layers' running mean, of which a share of `decay` stays.

    All ranks exchange tensors of the same shapes, so a rank on which a layer recorded nothing, as where its batch had
    no more samples than are to be selected, brings zeros; and a last number says whether any rank recorded at all.
    Where none did, no sample's gradient was formed, and the mean stays. Layers that did not train keep their mean: no
    gradient was formed for them, which is not a gradient of zero. A mean that takes in a NaN never loses it, so a step
    with one is left out.

    The mean is float32 by parameter; one that is not in it has a mean of zero. `sums` are float32, this rank's over the
    samples of the step that count.
    """
    parameters = [p for group in groups if is_active(group) for p in group.parameters.values()]
    totals = [sums[p] if p in sums else torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    recorded = totals[0].new_full((1,), float(bool(sums)))
    *totals, recorded = sum_over_ranks([*totals, recorded])
    if not bool(recorded) or not all_finite(totals):
        return dict(mean)
    moved = {
        parameter: (mean[parameter] if parameter in mean else torch.zeros_like(total)).lerp(total, 1 - decay)
        for parameter, total in zip(parameters, totals, strict=True)
    }
    return {**mean, **moved}
