"""How much the adapters of each layer add to what their modules put out: what LoRA-drop goes by."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from siftune.base.numerics import widened
from siftune.engine.groups import LayerGroup
from siftune.engine.suppression import adapted_modules, base_output, is_scaled, states
from siftune.models.adapters.bottleneck import BottleneckLayer


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

    The response of an adapted module is its output minus that of its base layer for the same input: ΔW x for LoRA. Of
    plain LoRA and bottlenecks it is read where it is computed; of others the two outputs are subtracted, so that on a
    base in half precision a response below its rounding is not seen.

    Args:
        groups: Layers, as `group_by_layer` returns them.

    Raises:
        AdapterError: As `refuse_unresponsive`.
    """
    found = Responses(len(groups))
    with ExitStack() as undo:
        for position, group in enumerate(groups):
            for module in adapted_modules(group):
                for hooked in _watch(found, position, module):
                    undo.callback(hooked.remove)
        yield found


def refuse_unresponsive(groups: Sequence[LayerGroup]) -> None:
    """Refuse layers whose response cannot be measured.

    Raises:
        AdapterError: A layer has no PEFT adapter, or its adapters keep no base layer or are merged into it.
    """
    for group in groups:
        adapted_modules(group)


def _watch(found: Responses, position: int, module: Any) -> Iterator[RemovableHandle]:
    """Have a module's response added up whenever it runs."""
    if not is_scaled(module):
        yield module.register_forward_hook(partial(_look, found, position), with_kwargs=True)
        return
    parts: list[Tensor] = []
    last = module.bottleneck_up if isinstance(module, BottleneckLayer) else module.lora_B
    for name in module.active_adapters:
        if name in last:
            yield last[name].register_forward_hook(partial(_keep, parts, module.scaling[name]))
    yield module.register_forward_hook(partial(_add_up, found, position, parts))


def _keep(parts: list[Tensor], scale: float, module: Any, args: Any, output: Tensor) -> None:
    parts.append(scale * widened(output))


def _add_up(found: Responses, position: int, parts: list[Tensor], module: Any, args: Any, output: Any) -> None:
    if parts:
        found.add(position, torch.stack(parts).sum(0))
    parts.clear()


def _look(found: Responses, position: int, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    found.add(position, states(output) - states(base_output(module, args, kwargs)))
