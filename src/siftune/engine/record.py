"""The record of one layer in one pass, and the tensors that fill it.

A `LayerRecord` holds the gradients of single samples. A `Tap` reads them from a module's output. A `RowVector` is a
vector with a copy per row, whose gradient is that of the rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from siftune.base.errors import UnsupportedError
from siftune.engine import kinds as per_sample


class LayerRecord:
    """Gradients of single samples for the parameters of one layer, in one pass.

    Args:
        rows: Rows B of the batch.
        positions: Positions T in a row.
        pairs: Rows i and i + B/2 are one sample.
        parameters: Parameters of the layer.

    Attributes:
        taken: Whether the gradients were released.
    """

    def __init__(self, rows: int, positions: int, pairs: bool, parameters: Sequence[nn.Parameter]) -> None:
        self.taken = False
        self._rows = rows
        self._positions = positions
        self._pairs = pairs
        self._parameters = parameters
        self._grads: dict[nn.Parameter, Tensor] = {}
        self._places: dict[nn.Parameter, Tensor] = {}  # free parts of the slab

    def place(self, parameter: nn.Parameter, like: Tensor) -> Tensor | None:
        """Memory for the rows' gradients for a matrix, (B, …), beside those of the layer's other parameters.

        A method then handles all parameters at once: (B, D), see `numerics.joined`. None if a place would be of no use:
        pairs are added up first, and a module may run more than once.
        """
        if self._pairs or parameter in self._grads:
            return None
        if not self._grads:
            sizes = [p.numel() for p in self._parameters]
            slab_BD = like.new_empty(self._rows, sum(sizes))
            parts = zip(self._parameters, torch.split(slab_BD, sizes, 1), strict=True)
            self._places = {p: part.view(self._rows, *p.shape) for p, part in parts}
        place = self._places.pop(parameter, None)
        fits = place is not None and (place.dtype, place.device) == (like.dtype, like.device)
        return place if fits else None

    def add(self, parameter: nn.Parameter, grads_BD: Tensor) -> None:
        """Add the rows' gradients for a parameter; a module may run more than once."""
        grads_SD = per_sample.over_pairs(grads_BD) if self._pairs else grads_BD
        before = self._grads.get(parameter)
        self._grads[parameter] = grads_SD if before is None else before + grads_SD

    def take(self) -> dict[nn.Parameter, Tensor]:
        """Return the gradients in the order of the parameters, and release them."""
        grads, self._grads, self._places, self.taken = self._grads, {}, {}, True
        return {parameter: grads[parameter] for parameter in self._parameters if parameter in grads}

    def by_row(self, values: Tensor) -> Tensor:
        """View a module's input or output as (B, T, …)."""
        if values.ndim == 2:
            return values.view(self._rows, self._positions, -1)
        return values

    def check(self, module: nn.Module, values: Tensor) -> None:
        """Refuse a module whose input or output has no row axis."""
        flat = values.ndim == 2 and values.shape[0] == self._rows * self._positions
        if not flat and (values.ndim < 3 or values.shape[0] != self._rows):
            raise UnsupportedError(
                f"{type(module).__name__} works on a tensor of shape {tuple(values.shape)} in a batch of {self._rows} "
                f"rows and {self._positions} positions, so the rows' gradients cannot be separated: leave it "
                "without an adapter"
            )

    def copies(self, vector: Tensor, inputs: Tensor) -> Tensor:
        """Expand a vector to one copy per row, a leaf whose gradient is that of the rows; (B, 1, …, D)."""
        between = (1,) * max(0, inputs.ndim - 2)
        return vector.detach().reshape(-1).expand(self._rows, *between, -1).requires_grad_()

    def spread(self, copies: Tensor, inputs: Tensor) -> Tensor:
        """Repeat the copies per row for values with rows and positions in one dimension."""
        return copies.repeat_interleave(self._positions, 0) if inputs.ndim == 2 else copies


class Tap(torch.autograd.Function):
    """Identity on a module's output that reads the output's gradient, and the module's input."""

    @staticmethod
    def forward(ctx: Any, read: Callable[[Tensor, Tensor], None], output: Tensor, inputs: Tensor) -> Tensor:
        """Pass `output` on; `read(grad_output, inputs)` is called in backward."""
        ctx.read = read
        ctx.save_for_backward(inputs.to(output.dtype))
        return output.detach()  # of a view, no module could change the values in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        """Read the gradient and pass it on."""
        ctx.read(grads[0], ctx.saved_tensors[0])
        return None, grads[0], None


class RowVector(Tensor):
    """One copy of a vector per row, (B, 1, D), that ignores flattening.

    PEFT flattens DoRA's magnitude and IA3's scales before it multiplies with them.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Ignore flattening, keep the class in divisions, and become a plain tensor otherwise."""
        if func in (Tensor.view, Tensor.flatten, Tensor.reshape):
            return args[0].as_subclass(Tensor)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        divided = func in (Tensor.div, Tensor.__truediv__, Tensor.true_divide)
        return result.as_subclass(cls) if divided else result
