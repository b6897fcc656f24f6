"""Gradients of single rows for every kind of trainable parameter; a parameter of another kind is refused by name.

What has no closed form here runs again on every row: see `generic_rows`.

A row's gradient for the weight of a linear map is one product of its output gradients with its inputs, so that of all
rows is one batched product, with as many operations as the sum over rows takes. See Goodfellow, "Efficient
Per-Example Gradient Computations" (arXiv 1510.01799).

Shapes: B rows, T positions, I inputs, O outputs, D values of a parameter. `...` stands for the positions, in any number
of dimensions. Sums run in float32, or float64 where the input is.
"""

from collections.abc import Mapping, Sequence
from enum import Enum

import torch
from peft.tuners.ia3.layer import Linear as IA3Linear
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from siftune.base.errors import UnsupportedError
from siftune.engine.groups import LayerGroup, refuse_allocator
from siftune.engine.substitution import Slot, parameter_owners, units
from siftune.models.adapters.bottleneck import BottleneckLayer
from siftune.models.modules import expert_banks, is_linear


def linear_weight(grad_BTO: Tensor, input_BTI: Tensor) -> Tensor:
    """Gradient of every row for W in y = x Wᵀ; (B, O, I), in the dtype of the output gradient."""
    return torch.bmm(grad_BTO.flatten(1, -2).transpose(1, 2), input_BTI.to(grad_BTO.dtype).flatten(1, -2))


def transposed_weight(grad_BTO: Tensor, input_BTI: Tensor) -> Tensor:
    """Gradient of every row for W in y = x W, as GPT-2's Conv1D has it; (B, I, O)."""
    return torch.bmm(input_BTI.to(grad_BTO.dtype).flatten(1, -2).transpose(1, 2), grad_BTO.flatten(1, -2))


def added_bias(grad_BTO: Tensor) -> Tensor:
    """Gradient of every row for a bias; (B, O)."""
    return _over_positions(grad_BTO)


def norm_weight(grad_BTO: Tensor, input_BTO: Tensor, eps: float) -> Tensor:
    """Gradient of every row for the weight of a LayerNorm over the last dimension; (B, O)."""
    normed_BTO = nn.functional.layer_norm(input_BTO, input_BTO.shape[-1:], eps=eps)
    return _over_positions(grad_BTO * normed_BTO)


def _over_positions(values_BTO: Tensor) -> Tensor:
    return values_BTO.flatten(1, -2).sum(1) if values_BTO.ndim > 2 else values_BTO


def over_pairs(grads_BD: Tensor) -> Tensor:
    """Add the gradients of row i and row i + B/2: the two halves of sample i; (B/2, …)."""
    first, second = grads_BD.chunk(2)
    return first + second


class Kind(Enum):
    """How a parameter is used, and so how a row's gradient is formed."""

    LINEAR = "weight of a linear map"
    TRANSPOSED = "weight of a Conv1D"
    BIAS = "added to the output"
    NORM = "weight of a LayerNorm"
    SCALE = "meets activations as it is"
    FLATTENED = "scales activations, flattened by PEFT"
    GENERIC = "of a module that runs again on every row"

    @property
    def is_vector(self) -> bool:
        """Whether the parameter is expanded to one copy per row."""
        return self in (Kind.SCALE, Kind.FLATTENED)

    @property
    def is_tapped(self) -> bool:
        """Whether a tap on the module that holds the parameter forms its gradients."""
        return not self.is_vector and self is not Kind.GENERIC

    def gradient(self, owner: nn.Module, grad_BTO: Tensor, input_BTI: Tensor) -> Tensor:
        """Gradient of every row from the owner's output gradient and its input; (B, …)."""
        if self is Kind.LINEAR:
            return linear_weight(grad_BTO, input_BTI)
        if self is Kind.TRANSPOSED:
            return transposed_weight(grad_BTO, input_BTI)
        if self is Kind.NORM:
            return norm_weight(grad_BTO, input_BTI, float(owner.eps))  # type: ignore[arg-type]
        return added_bias(grad_BTO)


def refuse_compiled(groups: Sequence[LayerGroup], compiled: str) -> None:
    """Refuse under torch.compile what is not tapped, as DoRA and IA3: it cannot trace one copy of a vector per row.

    Args:
        groups: The layers.
        compiled: What is compiled, for the message.
    """
    for group in groups:
        for unit in units(group):
            if any(_kind(unit, slot) in (Kind.FLATTENED, Kind.GENERIC) for slot in parameter_owners(unit)):
                raise UnsupportedError(
                    f"{compiled} is compiled by torch.compile, and {unit.name} is a {_type_of(unit.module)}, for which "
                    "samples can only be selected without it; turn torch_compile off, or use LoRA"
                )


def kinds_of(groups: Sequence[LayerGroup]) -> dict[Slot, Kind]:
    """Say how each trainable parameter of the layers is used.

    Raises:
        UnsupportedError: A parameter is used in a way that does not tell rows apart. The message names it and says
            what to do.
    """
    kinds: dict[Slot, Kind] = {}
    refuse_allocator(groups)
    for group in groups:
        if any(getattr(module, "_compiled_call_impl", None) for module in group.module.modules()):
            refuse_compiled([group], group.name)
        for unit in units(group):
            _refuse_tuner(unit)
        _refuse_experts(group)
        for unit in units(group):
            slots = parameter_owners(unit)
            kinds |= {slot: _kind(unit, slot) for slot in slots}
            _refuse_bias_with_dora(unit, kinds, slots)
    return kinds


def _kind(unit: LayerGroup, slot: Slot) -> Kind:
    owner = slot.owner
    if runs_again(unit.module):
        return Kind.GENERIC
    if isinstance(owner, Conv1D) and slot.name == "weight":
        return Kind.TRANSPOSED
    if is_linear(owner) and slot.name in ("weight", "bias"):
        return Kind.LINEAR if slot.name == "weight" else Kind.BIAS
    if isinstance(owner, nn.LayerNorm):
        return Kind.NORM if slot.name == "weight" else Kind.BIAS
    if type(owner) is DoraLinearLayer or isinstance(unit.module, IA3Linear):
        return Kind.FLATTENED
    if type(owner).__name__.endswith("RMSNorm") and slot.name == "weight":
        return Kind.SCALE
    raise UnsupportedError(
        f"{unit.name}: the gradient of {slot.name} in {type(owner).__name__} cannot be told apart by row; supported "
        "are PEFT's adapters on linear modules, and the weights and biases of linear and norm modules"
    )


def _is_known(module: nn.Module) -> bool:
    """Whether a PEFT module uses its parameters only by calling modules with the rows, or by scaling activations."""
    if isinstance(module, IA3Linear | LNTuningLayer | BottleneckLayer):
        return True
    return isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper | MultiheadAttention)


def runs_again(module: nn.Module) -> bool:
    """Whether a PEFT module on a linear one has no closed form here, so that it runs again on every row."""
    known = LoraLayer | IA3Linear | LNTuningLayer | BottleneckLayer
    if not isinstance(module, BaseTunerLayer) or isinstance(module, known) or not hasattr(module, "base_layer"):
        return False
    return is_linear(module.get_base_layer())


def _drops(module: nn.Module) -> bool:
    """Whether a module zeroes values at random, so that it would not run again as it did."""
    own = (vars(part).get(name) for part in module.modules() for name in ("rank_dropout", "module_dropout"))
    chances = [getattr(part, "p", 0) for part in module.modules() if "Dropout" in type(part).__name__]
    chances += [chance for kept in own if isinstance(kept, dict) for chance in kept.values()]
    return any(isinstance(chance, float | int) and chance > 0 for chance in chances)


def _type_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _refuse_tuner(unit: LayerGroup) -> None:
    """Refuse PEFT modules of which no row's gradient can be formed."""
    module = unit.module
    if not isinstance(module, BaseTunerLayer):
        return
    variants: Mapping[str, object] = getattr(module, "lora_variant", {})
    other = [type(v).__name__ for v in variants.values() if not isinstance(v, DoraLinearVariant)]
    if isinstance(module, ParamWrapper):
        raise UnsupportedError(
            f"{unit.name} is a {_type_of(module)}, by which experts are adapted: they see tokens of all rows mixed "
            "together, so samples cannot be told apart in them; put adapters on attention and on what every token "
            "passes, or take a method that does not choose rows"
        )
    if other or not (_is_known(module) or runs_again(module)):
        raise UnsupportedError(
            f"{unit.name} is a {_type_of(module)}{' with ' + ', '.join(other) if other else ''}, whose gradients "
            "cannot be told apart by row; use LoRA, rsLoRA, DoRA, or another of PEFT's adapters on linear modules"
        )
    if runs_again(module) and _drops(module):
        raise UnsupportedError(
            f"{unit.name} is a {_type_of(module)} with dropout, whose rows' gradients are formed by running it again, "
            "which would drop other values; set its dropout to 0, or use LoRA or DoRA"
        )


def _refuse_bias_with_dora(unit: LayerGroup, kinds: Mapping[Slot, Kind], slots: Sequence[Slot]) -> None:
    """PEFT's DoRA takes the base's bias off again, so that it is used twice."""
    base = getattr(unit.module, "base_layer", None)
    dora = any(type(slot.owner) is DoraLinearLayer for slot in slots)
    if dora and any(slot.owner is base and kinds[slot] is Kind.BIAS for slot in slots):
        raise UnsupportedError(
            f"{unit.name}: DoRA with trained biases of the base model is not supported; set bias='none', or use LoRA"
        )


def _refuse_experts(group: LayerGroup) -> None:
    for bank in expert_banks(group.module):
        if any(p.requires_grad for p in bank.parameters()):
            names = [name for name, module in group.module.named_modules() if module is bank]
            raise UnsupportedError(
                f"{group.name}.{names[0]}: experts see tokens of all rows mixed together, so samples cannot be "
                "told apart in them; put adapters on attention and on what every token passes"
            )
