"""Compilation of the parts of decoder layers: fewer passes over memory, the same gradients up to rounding.

A part is a direct child of a decoder layer: its attention, its MLP, a norm. Each is compiled in place, so that no name
in the model changes, and the code compiled for one layer is shared by all similar layers. Hooks on trainable parameters
(a cast, detaching) run once around a part instead of around each module in it (see `substitution.units`), so that
nothing untraceable is inside.

A part runs compiled if gradients pass through it. Otherwise it runs in eager mode: in evaluation, scoring, layers below
all trainable ones, the first layer on frozen embeddings, and attention that fills a cache. This limits the number of
compilations. The numbers of rows and tokens are symbolic: batches of another shape do not recompile, except batches of
one row, batches without padding, which need no mask, and rows too long for the products of `models.attention`.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import TorchDynamoException
from transformers import Cache

from siftune.base.errors import UnsupportedError
from siftune.base.text import one_line
from siftune.engine.substitution import as_one

_KINDS = 6  # largest number of parts with different code or shapes; dynamo itself stops at eight forms of one code


def forget_compiled() -> None:
    """Have torch compile again what it has compiled: such code does not run hooks that were added since."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class CompiledParts:
    """Runs parts of decoder layers compiled, until `remove()`.

    Make it before anything hooks or substitutes the layers' parameters.

    Args:
        layers: The decoder layers.
        frozen: Compile only parts without trainable parameters, if hooks access the others.
        backend: torch.compile's.

    Attributes:
        seconds: Wall time of compilation so far.
        graphs: Number of compilations so far, forward and backward together.

    Raises:
        UnsupportedError: The parts' forward is replaced already, as by a `device_map`, or there are too many different
            parts. In training: a part cannot be compiled, for example without a C++ compiler.
    """

    def __init__(self, layers: Sequence[nn.Module], frozen: bool = False, backend: str = "inductor") -> None:
        self.seconds = 0.0
        self.graphs = 0
        self._began = 0.0
        parts = [part for layer in layers for part in layer.children()]
        self._parts = [part for part in parts if not (frozen and any(p.requires_grad for p in part.parameters()))]
        _refuse(self._parts)
        # the same random numbers as in eager mode, for example of dropout
        options: Any = {"fallback_random": True} if backend == "inductor" else None
        for part in self._parts:
            compiled = torch.compile(part.forward, dynamic=True, backend=backend, options=options)
            part.forward = _either(type(part), part.forward, compiled)
        as_one.update(self._parts)
        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)

    def remove(self) -> None:
        """Run all parts in eager mode again; a second call has no effect."""
        if not self._parts:
            return
        callback_handler.remove_start_callback(self._begin)
        callback_handler.remove_end_callback(self._end)
        for part in self._parts:
            del part.forward  # of the instance, which uncovers that of the class
            as_one.discard(part)
        self._parts = []

    def _begin(self, _: Any) -> None:
        self._began = time.monotonic()

    def _end(self, _: Any) -> None:
        self.seconds += time.monotonic() - self._began
        self.graphs += 1


def _either(kind: type[nn.Module], eager: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs = (*args, *kwargs.values())
        graded = torch.is_grad_enabled() and any(v.requires_grad for v in inputs if isinstance(v, Tensor))
        if not graded or any(isinstance(v, Cache) for v in inputs):
            return eager(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            reason = one_line(str(getattr(error, "inner_exception", error)) or type(error).__name__)
            raise UnsupportedError(
                f"torch cannot compile {kind.__name__} here: {reason}; put a C++ compiler on the PATH, or train "
                "without compile"
            ) from error

    return forward


def _refuse(parts: Sequence[nn.Module]) -> None:
    taken = next((part for part in parts if "forward" in vars(part)), None)
    if taken is not None:
        raise UnsupportedError(
            f"the forward of {type(taken).__name__} is replaced already, as by a device_map: compile needs a model on "
            "one device"
        )
    kinds = {(type(part), tuple((name, *p.shape) for name, p in part.named_parameters())) for part in parts}
    if len(kinds) > _KINDS:
        raise UnsupportedError(
            f"the layers have {len(kinds)} different parts, as in a kit, and compiling each takes longer than it "
            f"saves: compile supports at most {_KINDS}"
        )
