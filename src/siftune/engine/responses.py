"""How much the adapters of each layer add to what their modules put out: what LoRA-drop goes by."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from siftune.engine.groups import LayerGroup
from siftune.engine.suppression import adapted_modules
from siftune.numerics import widened


class Responses:
    """Squared lengths of adapters' responses, added up over modules and forward passes.

    Args:
        layers: How many layers there are.

    Attributes:
        squares_L: (L,) float64 sums so far, on the CPU.
        seen: (B, T) attention mask of the batch at work, whose padding does not count; None: all of it counts.
    """

    def __init__(self, layers: int) -> None:
        self.squares_L = torch.zeros(layers, dtype=torch.float64)
        self.seen: Tensor | None = None

    def add(self, position: int, response: Tensor) -> None:
        """Add the response of a module of the layer at a position; (B, T, out), or tokens in another shape."""
        wide = widened(response)
        if self.seen is not None and wide.shape[:2] == self.seen.shape:
            wide = wide * self.seen.to(wide.device)[:, :, None]
        self.squares_L[position] += wide.square().sum().double().cpu()


@contextmanager
def measured_responses(groups: Sequence[LayerGroup]) -> Iterator[Responses]:
    """Measure the adapters' responses in the forward passes of a block.

    The response of an adapted module is its output minus that of its base layer for the same input: ΔW x for LoRA.

    Args:
        groups: Layers, as `group_by_layer` returns them.

    Raises:
        AdapterError: As `refuse_unresponsive`.
    """
    found = Responses(len(groups))
    with ExitStack() as undo:
        for position, group in enumerate(groups):
            for module in adapted_modules(group):
                look = partial(_look, found, position)
                undo.callback(module.register_forward_hook(look, with_kwargs=True).remove)
        yield found


def refuse_unresponsive(groups: Sequence[LayerGroup]) -> None:
    """Refuse layers whose response cannot be measured.

    Raises:
        AdapterError: A layer has no PEFT adapter, or its adapters keep no base layer or are merged into it.
    """
    for group in groups:
        adapted_modules(group)


def _look(found: Responses, position: int, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    found.add(position, _states(output) - _states(module.get_base_layer()(*args, **kwargs)))


def _states(output: Any) -> Tensor:
    """The hidden states that a module puts out; attention as a whole has other things behind them."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
