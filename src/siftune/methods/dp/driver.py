"""Private gradients of one model: clip every row's during backward, and add noise to their sum before the update."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from siftune.base import numerics
from siftune.base.errors import UnsupportedError
from siftune.engine.gate import is_active
from siftune.engine.groups import LayerGroup, group_by_layer, outside
from siftune.engine.survey import Survey
from siftune.engine.tape import Gradients, SampleGradients, Tape
from siftune.methods.dp import maths
from siftune.methods.dp.accounting import Mechanism
from siftune.methods.dp.secret import Secret

_AT_A_TIME = 2**25  # values to which noise is added at a time: 256 MB in float64 on the CPU


def finite_sum(losses_B: Tensor) -> Tensor:
    """Sum of the rows' losses that are finite, a scalar; the gradient of other rows is 0, or not finite."""
    return losses_B.where(losses_B.isfinite(), 0.0).sum()


class PrivateGradients:
    """Clips the rows' contributions to the gradients of a model, and adds noise to the sum, until `remove()`.

    The loss must be a sum over rows, such as the `finite_sum` of `models.loss.row_losses`. Every backward pass adds the
    clipped gradients of its rows to the parameters' `grad`; a gradient that is not finite adds nothing. `release` turns
    these into the private gradients for the optimizer. Attach methods that choose layers first.

    Args:
        model: Causal LM with adapters in its layers, or with layers that train themselves; nothing else may train.
        mechanism: The numbers, noise among them.
        secret: Source of the noise.

    Raises:
        UnsupportedError: A parameter's gradients cannot be separated by row, or it is in half precision.
    """

    def __init__(self, model: nn.Module, mechanism: Mechanism, secret: Secret) -> None:
        self.groups = group_by_layer(model)
        _refuse_outside(model, self.groups)
        _refuse_half(self.groups)
        self._mechanism = mechanism
        self._secret = secret
        # a row's norm is over all layers, so that all gradients of a pass are held
        self._tape = Tape(Survey(self.groups), lambda _: mechanism.clip, self._clip, at_once=True)

    def release(self, step: int) -> None:
        """Put noise on the gradients of a step, and divide them by the expected number of rows.

        Call it once per optimizer step, also if no row was drawn, before anything else reads the gradients. Layers that
        do not train in this step get none. `step` is the number of optimizer steps before it.
        """
        std, batch = self._mechanism.noise * self._mechanism.clip, self._mechanism.batch
        stream = self._secret.stream("noise", step)
        parameters = [parameter for group in self._active() for parameter in group.parameters.values()]
        for part in _packs(parameters):  # few copies to the CPU and back, for each of which the host waits
            totals = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in part]
            for parameter, noised in zip(part, maths.noised_means(totals, std, batch, stream), strict=True):
                parameter.grad = noised

    def remove(self) -> None:
        """Remove all hooks from the model; a second call has no effect."""
        self._tape.remove()

    def _active(self) -> list[LayerGroup]:
        return [group for group in self.groups if is_active(group)]

    def _clip(self, threshold: float, layers: Sequence[tuple[LayerGroup, SampleGradients]]) -> Gradients:
        """Sum of the rows' gradients, each row's clipped over all layers."""
        slabs = [(grads, numerics.joined([*grads.values()])) for _, grads in layers if grads]
        if not slabs:
            return {}
        factors_B = maths.clip_factors([slab_BD for _, slab_BD in slabs], threshold)
        clipped: dict[nn.Parameter, Tensor] = {}
        for grads, slab_BD in slabs:
            sums = numerics.split_like(maths.clipped_sum(slab_BD, factors_B.to(slab_BD.device)), [*grads.values()])
            clipped.update(zip(grads, sums, strict=True))
        return clipped


def _packs(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one dtype and device, of some `_AT_A_TIME` values."""
    for _, same in groupby(parameters, key=lambda p: (p.dtype, p.device)):
        part: list[nn.Parameter] = []
        for parameter in same:
            part.append(parameter)
            if sum(p.numel() for p in part) >= _AT_A_TIME:
                yield part
                part = []
        if part:
            yield part


def _refuse_outside(model: nn.Module, groups: Sequence[LayerGroup]) -> None:
    names = list(outside(model, groups))
    if names:
        raise UnsupportedError(
            f"{names[0]} trains outside of the decoder layers, where gradients of single rows are not formed and "
            "cannot be clipped: freeze it, and name targets within the layers"
        )


def _refuse_half(groups: Sequence[LayerGroup]) -> None:
    for group in groups:
        for name, parameter in group.parameters.items():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise UnsupportedError(
                    f"{group.name}.{name} trains in {str(parameter.dtype).removeprefix('torch.')}, which would round "
                    "sums of clipped gradients before noise is added: train in float32"
                )
