"""Parts of decoder layers as torch.compile makes them: fewer passes over memory, the same gradients up to rounding.

A part is a direct child of a decoder layer: its attention, its MLP, a norm. Each is compiled as a whole and in place,
so that no name in the model changes, and what was compiled for one layer serves all that are alike. What hooks do to
trainable parameters, a cast or detaching, is done once around a part instead of around each module in it (see
`substitution.units`), so that nothing untraceable stands inside.

A part runs compiled where gradients go through it. Evaluation, scoring, layers below all that train, what the first
layer does to frozen embeddings, and attention that fills a cache, of which each layer has its own, run as ever: that
keeps compilations few. Numbers of rows and of tokens are symbols in what is compiled: batches of another shape compile
nothing anew, but for those of one row, those without padding, which need no mask, and those of rows too long for the
products of `models.attention`.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import TorchDynamoException
from transformers import Cache

from siftune.base.errors import UnsupportedError
from siftune.base.words import one_line
from siftune.engine.substitution import as_one

_KINDS = 6  # so many that differ in code or shapes are compiled; dynamo itself stops at eight forms of one code


class CompiledParts:
    """Has parts of decoder layers run compiled, until `remove()`.

    It stands before anything that hooks or substitutes the layers' parameters.

    Args:
        layers: The decoder layers.
        frozen: Compile those parts only in which nothing trains, as where hooks look into the others.
        backend: torch.compile's.

    Attributes:
        seconds: Wall time that compiling has taken so far.
        graphs: How often torch has compiled so far, forward and backward together.

    Raises:
        UnsupportedError: Something runs the parts already, as with a `device_map`; there are too many kinds of them. In
            training: one cannot be compiled, as where there is no C++ compiler.
    """

    def __init__(self, layers: Sequence[nn.Module], frozen: bool = False, backend: str = "inductor") -> None:
        self.seconds = 0.0
        self.graphs = 0
        self._began = 0.0
        parts = [part for layer in layers for part in layer.children()]
        self._parts = [part for part in parts if not (frozen and any(p.requires_grad for p in part.parameters()))]
        _refuse(self._parts)
        # random numbers, as of dropout, stay those that they are without
        options: Any = {"fallback_random": True} if backend == "inductor" else None
        for part in self._parts:
            compiled = torch.compile(part.forward, dynamic=True, backend=backend, options=options)
            part.forward = _either(type(part), part.forward, compiled)
        as_one.update(self._parts)
        callback_handler.register_start_callback(self._begin)
        callback_handler.register_end_callback(self._end)

    def remove(self) -> None:
        """Let all parts run as they did; calling it twice does no harm."""
        if not self._parts:
            return
        callback_handler.remove_start_callback(self._begin)
        callback_handler.remove_end_callback(self._end)
        for part in self._parts:
            del part.forward  # of the instance: that of its class is found again
            as_one.discard(part)
        self._parts = []

    def _begin(self, _: Any) -> None:
        self._began = time.monotonic()

    def _end(self, _: Any) -> None:
        self.seconds += time.monotonic() - self._began
        self.graphs += 1


def _either(kind: type[nn.Module], eager: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        graded = torch.is_grad_enabled() and any(v.requires_grad for v in given if isinstance(v, Tensor))
        if not graded or any(isinstance(v, Cache) for v in given):
            return eager(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            reason = one_line(str(getattr(error, "inner_exception", error)) or type(error).__name__)
            raise UnsupportedError(
                f"torch cannot compile {kind.__name__} here: {reason}. Have a C++ compiler on the PATH, or train "
                "without compile"
            ) from error

    return forward


def _refuse(parts: Sequence[nn.Module]) -> None:
    taken = next((part for part in parts if "forward" in vars(part)), None)
    if taken is not None:
        raise UnsupportedError(
            f"something has put a forward of its own on {type(taken).__name__}, as a device_map does: compile goes "
            "with a model on one device"
        )
    kinds = {(type(part), tuple((name, *p.shape) for name, p in part.named_parameters())) for part in parts}
    if len(kinds) > _KINDS:
        raise UnsupportedError(
            f"the layers have {len(kinds)} different parts, as in a kit, and compiling each takes longer than it "
            f"saves: compile goes with at most {_KINDS}"
        )
