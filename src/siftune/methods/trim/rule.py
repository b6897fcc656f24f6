"""Trim's rule: one choice of rows for all layers, made before backward begins."""

from collections.abc import Callable, Sequence

from torch import Tensor

from siftune.base.errors import UnsupportedError
from siftune.engine.groups import LayerGroup
from siftune.engine.tape import SampleGradients
from siftune.methods.drivers.sample_choice import Choosing, whole_model
from siftune.methods.drivers.sample_driver import SampleRule, summed
from siftune.methods.drivers.support import Gradients
from siftune.methods.trim import maths
from siftune.methods.trim.settings import TrimSettings


class TrimmedSamples(SampleRule):
    """Chooses rows by what they cost, once for the model; layers are reduced as backward passes them.

    `losses` gives the mean token losses, (B,), of the batch whose forward pass was the last.
    """

    def __init__(self, settings: TrimSettings, groups: Sequence[LayerGroup], losses: Callable[[], Tensor]) -> None:
        super().__init__([whole_model(groups)], settings.select)
        self._which = settings.which
        self._losses = losses
        self._chosen: tuple[Choosing, Tensor, Tensor] | None = None  # the batch, rows, and what they count

    def reduce(self, choosing: Choosing, layers: Sequence[tuple[LayerGroup, SampleGradients]]) -> Gradients:
        """Choose rows where that has not been done for this batch, and add up their gradients."""
        grads = {parameter: part for _, parts in layers for parameter, part in parts.items()}
        if self._chosen is None or self._chosen[0] is not choosing:
            self._chosen = (choosing, *self._choose(choosing))
        _, chosen_K, scale = self._chosen
        return summed(grads, chosen_K, scale)

    def end(self) -> None:
        """Let the batch go."""
        self._chosen = None

    def _choose(self, choosing: Choosing) -> tuple[Tensor, Tensor]:
        losses_B = self._losses()
        if len(losses_B) != choosing.samples:
            raise UnsupportedError(
                f"trim keeps rows by their losses, but a batch of {choosing.samples} samples has {len(losses_B)} rows: "
                "pairs, as in preference training, are not supported; use gast"
            )
        uniform_B = choosing.uniform_on(losses_B.device)[0]
        chosen_K = maths.choose(losses_B, uniform_B, choosing.count, self._which)
        choosing.note(self.units[0], None if self._which == "random" else losses_B, chosen_K)
        return chosen_K, maths.factor(losses_B, chosen_K)
