"""GREATS' rule: one choice of samples for all layers, made when backward has passed them all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from siftune.base import numerics
from siftune.base.numerics import widened
from siftune.engine.groups import LayerGroup
from siftune.engine.ranks import world_size
from siftune.engine.tape import SampleGradients
from siftune.methods.drivers.sample_choice import Choosing, whole_model
from siftune.methods.drivers.sample_driver import SampleRule, summed
from siftune.methods.drivers.support import Gradients, Support
from siftune.methods.greats import maths
from siftune.methods.greats.settings import GREATSSettings


class HelpfulSamples(SampleRule):
    """Chooses the samples that most help the support set, by their gradients for all layers.

    The gradients of all samples for all layers are held until backward is through.
    """

    whole = True
    support: Support

    def __init__(self, settings: GREATSSettings, groups: Sequence[LayerGroup]) -> None:
        super().__init__([whole_model(groups)], settings.select)
        self.support = Support(settings.support_size)

    def reduce(self, choosing: Choosing, layers: Sequence[tuple[LayerGroup, SampleGradients]]) -> Gradients:
        """Choose samples by their gradients for all layers, and add these up."""
        grads = {parameter: part for _, parts in layers for parameter, part in parts.items()}
        if not grads:
            return {}
        device, support = next(iter(grads.values())).device, self.support.gradients
        products_B = numerics.added(
            [numerics.products(part, support[p]).to(device) for p, part in grads.items() if p in support]
            or [torch.zeros(choosing.samples, device=device)]
        )
        gram_BB = numerics.added([_gram(part).to(device) for part in grads.values()])
        live_B = gram_BB.diagonal() > 0
        # ranks' gradients are averaged, so that this rank's are followed for a share of the learning rate
        step = self._learning_rate() / world_size() * choosing.samples / choosing.count
        chosen_K = maths.greedy(products_B, gram_BB, live_B, choosing.count, step).sort().values
        choosing.note(self.units[0], products_B, chosen_K)
        scale = live_B.sum() / live_B[chosen_K].sum().clamp_min(1)
        scale = torch.where(torch.isfinite(products_B).all(), scale, torch.nan)
        return summed(grads, chosen_K, scale)

    def _learning_rate(self) -> float:
        """The learning rate of the coming step; 0, so that samples count each by itself, where none is known."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer is not None else 0.0


def _gram(grads_BD: Tensor) -> Tensor:
    """Inner products between the samples' gradients for one parameter; (B, B)."""
    wide_BD = widened(grads_BD).flatten(1)
    return wide_BD @ wide_BD.T
