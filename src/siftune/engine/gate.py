"""Gates on the decoder layers: they exclude the adapters of inactive layers from backward.

An inactive layer runs with its trainable parameters *detached*: autograd saves nothing for them and they receive no
gradient. `requires_grad` is unchanged, so that optimizers and DDP always see the same parameters. Up to and including
the lowest active layer the hidden states enter detached, so that backward ends there, even if a model makes its
embeddings require gradients for activation checkpointing. In models that loop over their layers, they enter detached
the first time only.

DDP waits for a gradient of every parameter. On request the lowest active layer's gate delivers zeros for the
inactive ones; the caller drops them before the optimizer step.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from siftune.base.errors import RecipeError
from siftune.engine.groups import LayerGroup, outside, refuse_allocator
from siftune.engine.substitution import ForwardSubstitution, Slot, untraced
from siftune.models.layers import with_hidden
from siftune.models.quantised import KeptUnpacked, refuse_packed

Deliver = Callable[[], Sequence[Tensor | None]]
Alive = Callable[[], bool]  # whether the training is still running for which hooks were set


class _Hooked(Protocol):
    alive: Alive

    def remove(self) -> None: ...


taped: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # layers with a tape -> that tape
_gates: WeakKeyDictionary[nn.Module, "LayerGates"] = WeakKeyDictionary()


def always() -> bool:
    """The answer for hooks that stay until they are removed."""
    return True


def in_backward() -> bool:
    """Whether autograd runs in this thread, as when activation checkpointing runs a layer again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def refuse_second(groups: Sequence[LayerGroup], holders: Mapping[nn.Module, _Hooked], message: str) -> None:
    """Refuse layers that have hooks of the same kind; hooks of a training that has ended are removed.

    Raises:
        RecipeError: A layer has hooks of a running training.
    """
    for group in groups:
        if (holder := holders.get(group.module)) is None:
            continue
        if holder.alive():
            raise RecipeError(message)
        holder.remove()


class Gate(torch.autograd.Function):
    """Identity on a layer's input that delivers the gradients of parameters when backward gets there.

    Everything in the layer depends on its input, so this backward runs after all others of the layer.
    """

    @staticmethod
    def forward(ctx: Any, deliver: Deliver, hidden: Tensor, *parameters: Tensor) -> Tensor:
        """Pass `hidden` on; `deliver()` will return one gradient for each of `parameters`."""
        ctx.deliver = deliver
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient on, and deliver those of the parameters."""
        grad_hidden = grads[0] if ctx.needs_input_grad[1] else None
        return None, grad_hidden, *ctx.deliver()


def nothing_trains_before(model: nn.Module, groups: Sequence[LayerGroup]) -> bool:
    """Whether no trainable parameter precedes the layers, judging by the model's structure.

    Trainable parameters outside the layers count as upstream unless they belong to the output head alone.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    after = {id(p) for p in head.parameters()} if head is not None else set()
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    after -= {id(p) for p in embeddings.parameters()} if embeddings is not None else set()
    return all(id(p) in after for p in outside(model, groups).values())


def is_active(group: LayerGroup) -> bool:
    """Whether a layer trains now; a layer without gates does."""
    gates = _gates.get(group.module)
    return gates is None or group.index in gates.active


class LayerGates:
    """Hooks on the layers of one model; all layers are active until `set_active`.

    Args:
        model: The model that holds the layers.
        groups: The layers and their trainable parameters.
        deliver_zeros: Deliver gradients of zero for inactive layers' parameters, as DDP and ZeRO need.
        alive: Asked when a pass begins; the hooks remove themselves if it returns False.

    Raises:
        RecipeError: The layers have gates already; or a tape, before which gates must come.
        UnsupportedError: A layer has an adapter that needs the gradients of all layers, or the base is packed for
            inference.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[LayerGroup], deliver_zeros: bool = False, alive: Alive = always
    ) -> None:
        self._groups = list(groups)
        self.alive = alive
        refuse_second(
            self._groups,
            taped,
            "samples are selected in these layers already, but layers must be chosen first: list IST before GAST "
            "among the callbacks, turn restore_callback_states_from_checkpoint off, which changes their order, and in "
            "a custom loop attach it first",
        )
        refuse_second(self._groups, _gates, "another method chooses among these layers already: use one of them")
        refuse_allocator(self._groups)
        refuse_packed(model)
        self._deliver_zeros = deliver_zeros
        self._stop_at_lowest = nothing_trains_before(model, groups)
        self._active = frozenset(group.index for group in self._groups)
        self._lowest = min(self._active)
        self._substitution = ForwardSubstitution(self._groups, self._detach_inactive)
        self._handles: list[RemovableHandle] = [
            group.module.register_forward_pre_hook(partial(self._enter, group.index), with_kwargs=True)
            for group in self._groups
        ]
        self._unpacked = KeptUnpacked(model)  # layers may be compared in eval mode
        _gates.update({group.module: self for group in self._groups})

    @property
    def active(self) -> frozenset[int]:
        """Numbers of the layers that train."""
        return self._active

    def set_active(self, layers: Collection[int]) -> None:
        """Choose the layers that train, by `LayerGroup.index`, from the next forward on.

        Call it between optimizer steps only: activation checkpointing runs a layer again in backward.
        """
        self._active = frozenset(layers)
        self._lowest = min(self._active)

    def inactive_parameters(self) -> list[nn.Parameter]:
        """Parameters of the layers that do not train."""
        return [p for group in self._groups if group.index not in self._active for p in group.parameters.values()]

    def drop_inactive_grads(self) -> None:
        """Set the gradients of inactive layers to None, so that the optimizer skips them."""
        for parameter in self.inactive_parameters():
            parameter.grad = None

    def remove(self) -> None:
        """Remove all hooks; a second call has no effect."""
        self._substitution.remove()
        self._unpacked.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for group in self._groups:
            if _gates.get(group.module) is self:
                del _gates[group.module]

    def __enter__(self) -> "LayerGates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _detach_inactive(self, slot: Slot, current: Tensor, _: Tensor | None) -> Tensor:
        """Substitute a parameter: itself in an active layer, detached in others."""
        return current if slot.layer in self._active else current.detach()

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run before a layer: cut the graph at and below the lowest active layer, which may deliver zeros."""
        # a compiled model would be divided at this question; in backward, a thread of autograd's cannot answer it
        asked = index == self._groups[0].index and not torch.compiler.is_compiling() and not in_backward()
        if asked and not self.alive():
            self.remove()
            return None
        all_active = len(self._active) == len(self._groups)
        if all_active or index > self._lowest or not torch.is_grad_enabled():
            return None
        if self._stop_at_lowest:
            return with_hidden(args, kwargs, partial(self._end_backward, index, module))
        wanted = self._deliver_zeros and index == self._lowest
        return with_hidden(args, kwargs, self._with_zeros) if wanted else None

    def _end_backward(self, index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """Detach a layer's input."""
        if hidden.requires_grad and self._depends_on_layers(hidden):
            return hidden  # the model loops over its layers
        if hidden.requires_grad and hidden.is_leaf and in_backward():
            # reentrant checkpointing runs the layer again, and differentiates with respect to this input
            return self._with_zeros(hidden) if index == self._lowest and self._deliver_zeros else hidden
        hidden = hidden.detach()
        if index != self._lowest:
            return hidden
        if getattr(module, "gradient_checkpointing", False):
            hidden.requires_grad_()  # reentrant checkpointing skips a layer whose input needs no gradient
        return self._with_zeros(hidden) if self._deliver_zeros else hidden

    def _with_zeros(self, hidden: Tensor) -> Tensor:
        """Have backward deliver the zeros for which DDP and ZeRO wait."""
        idle = self.inactive_parameters()
        gate: Any = Gate  # `apply` is typed in some versions of torch only
        gated: Tensor = gate.apply(lambda: [torch.zeros_like(p) for p in idle], hidden, *idle)
        return gated

    def _depends_on_layers(self, hidden: Tensor) -> bool:
        ours = {id(p) for group in self._groups if group.index in self._active for p in group.parameters.values()}
        return is_upstream(hidden, lambda node: id(getattr(node, "variable", None)) in ours)


@untraced
def is_upstream(value: Tensor, wanted: Callable[[Any], bool]) -> bool:
    """Whether autograd's graph of a value has a node that `wanted` accepts."""
    waiting = [value.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if wanted(node):
            return True
        seen.add(node)
        waiting.extend(before for before, _ in node.next_functions)
    return False
