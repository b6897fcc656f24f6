"""Stand in for trainable parameters during a forward pass.

Trainable parameters stay where the optimizer, DDP and checkpoints expect them. Where a method needs other tensors
in their place (detached, in another dtype) they are *substituted*: while a module runs, it holds a tensor made
from the parameter, and autograd carries the gradient back through whatever made it.
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

as_one: WeakSet[nn.Module] = WeakSet()  # modules around whose call parameters are substituted, whatever is in them

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
    """Return for every trainable parameter of a layer the place where a module holds it.

    A parameter that several modules of the layer hold comes once for each.
    """
    wanted = {id(p) for p in group.parameters.values()}
    return [
        Slot(group.index, module, name, parameter)
        for module in group.module.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in wanted
    ]


class Substitution:
    """Puts other tensors in the place of a layer's trainable parameters, and the parameters back.

    Swaps nest, also between several substitutions of one layer, as long as they end in the reverse order: an
    inner swap is given the tensors that the outer one put in place.

    Args:
        group: The layer; its owners are looked up once, here.
    """

    def __init__(self, group: LayerGroup) -> None:
        self._slots: list[tuple[dict[str, Any], Slot]] = [(s.owner._parameters, s) for s in parameter_owners(group)]
        self._saved: list[list[Tensor]] = []

    def swap(self, replace: Callable[[Slot, Tensor], Tensor]) -> None:
        """Put `replace(slot, current)` in the place of every parameter."""
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
        """Put the parameters themselves back, whatever swaps are left open; without one, do nothing.

        This cleans up after a forward pass that ended without its hooks, as on Ctrl-C. Then it does not matter
        which of several open substitutions is cleaned up first.
        """
        if self._saved:
            self._saved.clear()
            for held, slot in self._slots:
                held[slot.name] = slot.parameter


class ForwardSubstitution:
    """Substitutes parameters whenever the modules that use them run, until `remove()`.

    The hooks sit on the adapted modules (for parameters outside of adapters: on the modules that hold them), not
    on the layer: activation checkpointing in transformers recomputes a layer's `forward` without the layer's own
    hooks, while those inside it run again. Recomputing stops early by an exception, so the hooks restore after an
    exception too.

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
            substitution.restore_all()  # left open where Ctrl-C ended a forward
            given = _first_input((*args, *kwargs.values()))
            substitution.swap(lambda slot, current: replace(slot, current, given))

        def after(*_: Any) -> None:
            substitution.restore()

        self._substitutions.append(substitution)
        self._handles += [
            unit.module.register_forward_pre_hook(untraced(before), with_kwargs=True),
            unit.module.register_forward_hook(untraced(after), prepend=True, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off and put all parameters back; calling it twice does no harm."""
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
    """Keep a hook out of what torch.compile traces: it works on this very call, with the tensors of now."""
    wrapped: Hook = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return wrapped


def use_base_dtype(model: nn.Module, groups: Iterable[LayerGroup]) -> ForwardSubstitution:
    """Use trainable parameters in the dtype of the hidden states while they are kept in their own.

    float32 adapters on a bfloat16 base then compute in bfloat16, as the base does, instead of casting every
    input to float32. Autograd goes through the cast: gradients arrive in the parameters' dtype. IA3's
    vectors are not cast: they begin at one, beside which half precision does not resolve small updates, and PEFT casts
    their inputs.

    Args:
        model: The model; what it trains outside of the layers is cast as well.
        groups: Its layers, as `group_by_layer` returns them.

    Returns:
        A handle, also usable as a context manager; `remove()` takes the hooks off.
    """
    # embeddings are given token numbers: what they give has the dtype of what is frozen
    frozen = (p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    base = next(frozen, None)
    wide = [module for module in model.modules() if isinstance(module, IA3Layer)]
    kept = {id(p) for module in wide for p in module.parameters() if p.requires_grad}

    def cast(slot: Slot, current: Tensor, given: Tensor | None) -> Tensor:
        dtype = base if given is None else given.dtype
        as_it_is = dtype is None or not current.is_floating_point() or id(slot.parameter) in kept
        return current if as_it_is else current.to(dtype)

    layers = list(groups)
    rest = LayerGroup(-1, "", model, outside(model, layers))
    return ForwardSubstitution([*layers, rest], cast)


def units(group: LayerGroup) -> list[LayerGroup]:
    """Split a layer's parameters by the module whose call uses them: one group per such module.

    That is the one of `as_one` around them, else the outermost PEFT module (DoRA reads its matrices without calling
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
