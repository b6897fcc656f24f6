"""Gradients of single rows of a module that has no closed form: the module runs again on each row, in backward.

A row's gradient is that of ⟨its output gradient, f(its input)⟩ for the module's parameters, f being the module's own
forward. `torch.func` forms it for all rows at a time, by vmap over grad; where the module cannot be traced so (autograd
functions of the old kind; weights that are quantised, whose kernels read a traced tensor's memory as if it were one
row's, and crash) one row is run after the other, with the same result.

It costs a further forward and backward of the module, its base layer included, and holds one module's at a time.

Shapes: B rows, T positions, I inputs, O outputs.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from siftune.base.errors import UnsupportedError
from siftune.engine.groups import LayerGroup
from siftune.engine.kinds import runs_again
from siftune.engine.record import LayerRecord, Tap
from siftune.engine.substitution import Substitution, units, untraced

logger = logging.getLogger(__name__)

Values = Mapping[nn.Parameter, Tensor]


def _kind_of(module: nn.Module) -> str:
    """What PEFT calls the kind of a module, such as vera."""
    return type(module).__module__.split(".")[-2]


@cache
def _tell_of_rows(kind: str) -> None:
    """Say once of a kind that it takes the slowest way."""
    logger.warning("torch.func cannot trace modules of %s here, so they run again on one row after the other", kind)


class ModuleRows:
    """Runs a module again on single rows.

    Args:
        unit: The module and its trainable parameters.
    """

    def __init__(self, unit: LayerGroup) -> None:
        self.parameters = list(unit.parameters.values())
        self._module = unit.module
        self._substitution = Substitution(unit)
        base: Any = unit.module.get_base_layer()  # type: ignore[operator]
        self._traced = type(base.weight) is nn.Parameter
        if not self._traced:
            _tell_of_rows(_kind_of(unit.module))

    def gradients(self, values: Values, grad_BTO: Tensor, given_BTI: Tensor) -> dict[nn.Parameter, Tensor]:
        """The gradients of every row, (B, …) for each parameter.

        Args:
            values: What stood in for each parameter when the module ran, detached.
            grad_BTO: The gradient of its output.
            given_BTI: Its input.
        """
        held = [values[p] for p in self.parameters]
        rows = (grad_BTO.unsqueeze(1), given_BTI.unsqueeze(1))
        if self._traced:
            try:
                return self._named(torch.func.vmap(torch.func.grad(self._product), (None, 0, 0))(held, *rows))
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError):  # of what is wrong besides, the rows one by one will tell
                self._traced = False
                _tell_of_rows(_kind_of(self._module))
        single = [self._of_row(held, grad, given) for grad, given in zip(*rows, strict=True)]
        return self._named([torch.stack(grads) for grads in zip(*single, strict=True)])

    def _named(self, grads: list[Tensor]) -> dict[nn.Parameter, Tensor]:
        return dict(zip(self.parameters, grads, strict=True))

    def _product(self, values: list[Tensor], grad_1TO: Tensor, given_1TI: Tensor) -> Tensor:
        """⟨grad, f(given)⟩ with the given values as parameters."""
        by_parameter = dict(zip(self.parameters, values, strict=True))
        self._substitution.swap(lambda slot, _: by_parameter[slot.parameter])
        try:
            output: Tensor = self._module.forward(given_1TI)  # without the module's hooks, which record
        finally:
            self._substitution.restore()
        return (output * grad_1TO).sum()

    def _of_row(self, values: list[Tensor], grad_1TO: Tensor, given_1TI: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_() for value in values]
            found = torch.autograd.grad(self._product(leaves, grad_1TO, given_1TI), leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


class ModuleTap:
    """Records a module's gradients of rows by running it again, when backward gets to its output.

    Args:
        unit: The module and its trainable parameters.
        record: Gives the record of a layer in the pass that runs; None where nothing is recorded.

    Attributes:
        parameters: The module's.
        stood: What stands in for each while the module runs, detached.
    """

    def __init__(self, unit: LayerGroup, record: Callable[[int], LayerRecord | None]) -> None:
        self.parameters = list(unit.parameters.values())
        self.stood: dict[nn.Parameter, Tensor] = {}
        self._unit = unit
        self._record = record
        self._rows = ModuleRows(unit)

    def put_on(self) -> RemovableHandle:
        """Put the tap on the module's output."""
        return self._unit.module.register_forward_hook(untraced(self._after), with_kwargs=True)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> Tensor | None:
        values, self.stood = self.stood, {}
        record = self._record(self._unit.index)
        if record is None or not values or not torch.is_grad_enabled() or not output.requires_grad:
            return None
        record.check(module, output)
        if kwargs or len(args) != 1:
            raise UnsupportedError(
                f"{self._unit.name} is given more than hidden states, so it cannot run again on single rows; use LoRA "
                "or DoRA"
            )
        device = output.device.type
        precision = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        tap: Any = Tap
        tapped: Tensor = tap.apply(partial(self._read, record, values, precision), output, args[0])
        return tapped

    def _read(self, record: LayerRecord, values: Values, precision: Any, grad: Tensor, given: Tensor) -> None:
        with torch.autocast(*precision):
            for parameter, grads in self._rows.gradients(values, record.by_row(grad), record.by_row(given)).items():
                record.add(parameter, grads)


def taps_of(groups: Sequence[LayerGroup], record: Callable[[int], LayerRecord | None]) -> list[ModuleTap]:
    """Taps for the modules of the layers that have no closed form, of which the log tells."""
    again = [unit for group in groups for unit in units(group) if runs_again(unit.module)]
    if again:
        logger.warning(
            "gradients of single rows have no closed form for %s: these modules run once more in backward, which takes "
            "longer than with LoRA",
            ", ".join(sorted({_kind_of(unit.module) for unit in again})),
        )
    return [ModuleTap(unit, record) for unit in again]
