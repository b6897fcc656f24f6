"""Substitution of trainable parameters during a forward pass.

Trainable parameters stay in the places where the optimizer, DDP and checkpoints expect them. If a method needs other
tensors instead (detached, in another dtype), they are *substituted*: while a module runs, it holds a tensor computed
from the parameter, and autograd propagates the gradient back to the parameter.
"""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import torch
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from siftune.engine.groups import LayerGroup, outside

Hook = TypeVar("Hook", bound=Callable[..., Any])

as_one: WeakSet[nn.Module] = WeakSet()  # modules whose parameters are substituted around the call of the module itself

# modules that hold others but are never called
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class Slot(NamedTuple):
    """The place of a trainable parameter.

    Attributes:
        layer: Number of the layer, as `LayerGroup.index`.
        owner: The module that holds the parameter.
        name: The parameter's name in that module.
        parameter: The parameter.
    """

    layer: int
    owner: nn.Module
    name: str
    parameter: nn.Parameter


def parameter_owners(group: LayerGroup) -> list[Slot]:
    """Return the place of every trainable parameter of a layer.

    A parameter of several modules of the layer has a place in each.
    """
    wanted = {id(p) for p in group.parameters.values()}
    return [
        Slot(group.index, module, name, parameter)
        for module in group.module.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in wanted
    ]


class Substitution:
    """Replaces a layer's trainable parameters by other tensors, and restores them.

    Swaps nest, also between several substitutions of one layer, if they end in the reverse order: an inner swap
    receives the tensors of the outer one.

    Args:
        group: The layer; the places of its parameters are looked up once, here.
    """

    def __init__(self, group: LayerGroup) -> None:
        self._slots: list[tuple[dict[str, Any], Slot]] = [(s.owner._parameters, s) for s in parameter_owners(group)]
        self._saved: list[list[Tensor]] = []

    def swap(self, replace: Callable[[Slot, Tensor], Tensor]) -> None:
        """Replace every parameter by `replace(slot, current)`."""
        saved: list[Tensor] = []
        self._saved.append(saved)  # before the loop: restore() then also cleans up after a `replace` that raises
        for held, slot in self._slots:
            current = held[slot.name]
            held[slot.name] = replace(slot, current)
            saved.append(current)

    def restore(self) -> None:
        """Undo the last swap; without one, do nothing."""
        if self._saved:
            for (held, slot), previous in zip(self._slots, self._saved.pop(), strict=False):
                held[slot.name] = previous

    def restore_all(self) -> None:
        """Restore the parameters themselves, however many swaps are open; without one, do nothing.

        This cleans up after a forward pass that ended without its hooks, as on Ctrl-C. Several open substitutions can
        be cleaned up in any order.
        """
        if self._saved:
            self._saved.clear()
            for held, slot in self._slots:
                held[slot.name] = slot.parameter


class ForwardSubstitution:
    """Substitutes parameters whenever the modules that use them run, until `remove()`.

    The hooks are on the adapted modules (for parameters outside of adapters: on the modules that hold them), not on
    the layer: activation checkpointing in transformers recomputes a layer's `forward` without the layer's own hooks,
    while those inside it run again. Recomputation stops early by an exception, so the hooks restore after an exception
    too.

    Args:
        groups: The layers.
        replace: Called with the parameter's place, the current tensor (the parameter, or what an outer
            substitution put there) and the module's first floating-point input (None without one); returns the
            tensor to use.
    """

    def __init__(
        self,
        groups: Iterable[LayerGroup],
        replace: Callable[[Slot, Tensor, Tensor | None], Tensor],
    ) -> None:
        self._handles: list[Any] = []
        self._substitutions: list[Substitution] = []
        for group in groups:
            for unit in units(group):
                self._hook(unit, replace)

    def _hook(self, unit: LayerGroup, replace: Callable[..., Tensor]) -> None:
        substitution = Substitution(unit)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            substitution.restore_all()  # left open if Ctrl-C ended a forward pass
            hidden = _first_input((*args, *kwargs.values()))
            substitution.swap(lambda slot, current: replace(slot, current, hidden))

        def after(*_: Any) -> None:
            substitution.restore()

        self._substitutions.append(substitution)
        self._handles += [
            unit.module.register_forward_pre_hook(untraced(before), with_kwargs=True),
            unit.module.register_forward_hook(untraced(after), prepend=True, always_call=True),
        ]

    def remove(self) -> None:
        """Remove the hooks and restore all parameters; a second call has no effect."""
        for handle in self._handles:
            handle.remove()
        for substitution in self._substitutions:
            substitution.restore_all()
        self._handles.clear()
        self._substitutions.clear()

    def __enter__(self) -> "ForwardSubstitution":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def untraced(hook: Hook) -> Hook:
    """Exclude a hook from torch.compile's trace, since it depends on the current call and its tensors."""
    wrapped: Hook = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return wrapped


def use_base_dtype(model: nn.Module, groups: Iterable[LayerGroup]) -> ForwardSubstitution:
    """Use trainable parameters in the dtype of the hidden states, and store them in their own.

    float32 adapters on a bfloat16 base then compute in bfloat16, like the base, instead of casting every
    input to float32. Autograd goes through the cast: gradients arrive in the parameters' dtype. IA3's
    vectors are not cast: they begin at one, beside which half precision does not resolve small updates, and PEFT casts
    their inputs.

    Args:
        model: The model; its trainable parameters outside of the layers are cast as well.
        groups: Its layers, as `group_by_layer` returns them.

    Returns:
        A handle, also usable as a context manager; `remove()` removes the hooks.
    """
    # embeddings receive token ids; their output has the dtype of the frozen weights
    frozen = (p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    base = next(frozen, None)
    wide = [module for module in model.modules() if isinstance(module, IA3Layer)]
    own_dtype = {id(p) for module in wide for p in module.parameters() if p.requires_grad}

    def cast(slot: Slot, current: Tensor, hidden: Tensor | None) -> Tensor:
        dtype = base if hidden is None else hidden.dtype
        unchanged = dtype is None or not current.is_floating_point() or id(slot.parameter) in own_dtype
        return current if unchanged else current.to(dtype)

    layers = list(groups)
    rest = LayerGroup(-1, "", model, outside(model, layers))
    return ForwardSubstitution([*layers, rest], cast)


def units(group: LayerGroup) -> list[LayerGroup]:
    """Split a layer's parameters by the module whose call uses them: one group per such module.

    It is the module of `as_one` around them, else the outermost PEFT module (DoRA reads its matrices without calling
    them), else the module that holds them.
    """
    wanted = {id(p) for p in group.parameters.values()}
    units: dict[nn.Module, LayerGroup] = {}
    for key, parameter in group.module.named_parameters(remove_duplicate=False):
        if id(parameter) in wanted:
            parts = key.split(".")
            chain = [group.module.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
            wholes = [depth for depth, module in enumerate(chain) if module in as_one]
            tuners = [depth for depth, module in enumerate(chain) if isinstance(module, BaseTunerLayer)]
            callables = [depth for depth, module in enumerate(chain) if not isinstance(module, _CONTAINERS)]
            depth = (wholes or tuners or callables[-1:])[0]
            name = ".".join([group.name, *parts[:depth]]).strip(".")
            unit = units.setdefault(chain[depth], LayerGroup(group.index, name, chain[depth], {}))
            unit.parameters[".".join(parts[depth:])] = parameter
    return list(units.values())


def _first_input(values: Iterable[Any]) -> Tensor | None:
    """Return the first floating-point tensor among a call's arguments."""
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
