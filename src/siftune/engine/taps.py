"""What stands in a layer while the tape records: a tap on a module's output, and vectors with a copy per row."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Tap(torch.autograd.Function):
    """Identity on a module's output that reads the output's gradient, and the module's input."""

    @staticmethod
    def forward(ctx: Any, read: Callable[[Tensor, Tensor], None], output: Tensor, given: Tensor) -> Tensor:
        """Pass `output` on; `read(grad_output, given)` is called in backward."""
        ctx.read = read
        ctx.save_for_backward(given.to(output.dtype))
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        """Read the gradient and pass it on."""
        ctx.read(grads[0], ctx.saved_tensors[0])
        return None, grads[0], None


class RowVector(Tensor):
    """One copy of a vector per row, (B, 1, D), which keeps the rows where a vector would be flattened.

    PEFT flattens DoRA's magnitude and IA3's scales before it multiplies with them.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Ignore flattening, stay what it is when divided, and become a plain tensor otherwise."""
        if func in (Tensor.view, Tensor.flatten, Tensor.reshape):
            return args[0].as_subclass(Tensor)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        divided = func in (Tensor.div, Tensor.__truediv__, Tensor.true_divide)
        return result.as_subclass(cls) if divided else result
