"""Survey of the layers for recording: the kind of every trainable parameter, and the module that uses it.

It is made once per selection, before anything is put on the model. A parameter without a closed form for the gradients
of single rows raises an error that names it.
"""

from collections.abc import Sequence

from peft.tuners.ia3.layer import Linear as IA3Linear
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from siftune.base.errors import UnsupportedError
from siftune.engine.groups import LayerGroup, refuse_allocator
from siftune.engine.kinds import Kind
from siftune.engine.substitution import Slot, parameter_owners, units
from siftune.models.adapters.bottleneck import BottleneckLayer
from siftune.models.modules import expert_banks, is_linear


class Survey:
    """Use of the trainable parameters in the layers of a model.

    Args:
        groups: The layers and their trainable parameters.

    Attributes:
        groups: The same.
        kinds: Kind of the parameter at each place.
        vectors: Kinds of the parameters that are expanded to one copy per row.
        tapped: Modules whose outputs are tapped, each with the places and kinds of its parameters.

    Raises:
        UnsupportedError: The gradients of a parameter cannot be separated by row, or torch.compile runs a layer that it
            could not trace. The message names it and the remedy.
    """

    def __init__(self, groups: Sequence[LayerGroup]) -> None:
        refuse_allocator(groups)
        self.groups = list(groups)
        self.kinds: dict[Slot, Kind] = {}
        self._flattened: LayerGroup | None = None  # a unit that torch.compile cannot trace
        for group in groups:
            parts = units(group)
            for unit in parts:
                _refuse_tuner(unit)
            _refuse_experts(group)
            flattened = None
            for unit in parts:
                kinds = {slot: _kind(unit, slot) for slot in parameter_owners(unit)}
                _refuse_bias_with_dora(unit, kinds)
                if Kind.FLATTENED in kinds.values():
                    flattened = flattened or unit
                self.kinds |= kinds
            if flattened and any(getattr(module, "_compiled_call_impl", None) for module in group.module.modules()):
                _refuse_compiled(group.name, flattened)
            self._flattened = self._flattened or flattened
        self.vectors = {slot.parameter: kind for slot, kind in self.kinds.items() if kind.is_vector}
        self.tapped: dict[nn.Module, list[tuple[Slot, Kind]]] = {}
        for slot, kind in self.kinds.items():
            if not kind.is_vector:
                self.tapped.setdefault(slot.owner, []).append((slot, kind))

    def refuse_compiled(self, compiled: str) -> None:
        """Refuse DoRA and IA3 under torch.compile, which cannot trace one copy of a vector per row.

        Args:
            compiled: Name of the compiled part, for the message.
        """
        if self._flattened is not None:
            _refuse_compiled(compiled, self._flattened)


def _refuse_compiled(compiled: str, unit: LayerGroup) -> None:
    raise UnsupportedError(
        f"{compiled} is compiled by torch.compile, and {unit.name} is a {_type_of(unit.module)}, for which samples can "
        "only be selected without it: turn torch_compile off, or use LoRA"
    )


def _kind(unit: LayerGroup, slot: Slot) -> Kind:
    owner = slot.owner
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
        f"{unit.name}: the gradient of {slot.name} in {type(owner).__name__} cannot be separated by row; supported are "
        "LoRA, rsLoRA, DoRA, IA3, series and parallel adapters, and the weights and biases of linear and norm modules"
    )


def _type_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _refuse_tuner(unit: LayerGroup) -> None:
    """Refuse PEFT modules that use their parameters otherwise than by modules on the rows or by scaling activations."""
    module = unit.module
    if not isinstance(module, BaseTunerLayer):
        return
    if isinstance(module, ParamWrapper):
        raise UnsupportedError(
            f"{unit.name} is a {_type_of(module)} on experts, which see the tokens of all rows mixed together, so "
            "samples cannot be separated: put adapters on attention and on modules that see every token, or use a "
            "method that does not select rows"
        )
    variants = [type(v).__name__ for v in getattr(module, "lora_variant", {}).values()]
    others = [name for name in variants if name != DoraLinearVariant.__name__]
    separable = isinstance(module, LoraLayer | IA3Linear | LNTuningLayer | BottleneckLayer)
    if others or not separable or isinstance(module, MultiheadAttention):
        raise UnsupportedError(
            f"{unit.name} is a {_type_of(module)}{' with ' + ', '.join(others) if others else ''}, whose gradients "
            "cannot be separated by row: use LoRA, rsLoRA, DoRA or IA3, or a method that does not select rows"
        )


def _refuse_bias_with_dora(unit: LayerGroup, kinds: dict[Slot, Kind]) -> None:
    """PEFT's DoRA subtracts the base's bias again, so that it is used twice."""
    base = getattr(unit.module, "base_layer", None)
    dora = any(type(slot.owner) is DoraLinearLayer for slot in kinds)
    if dora and any(slot.owner is base and kind is Kind.BIAS for slot, kind in kinds.items()):
        raise UnsupportedError(
            f"{unit.name}: DoRA with trained biases of the base model is not supported; set bias='none', or use LoRA"
        )


def _refuse_experts(group: LayerGroup) -> None:
    for bank in expert_banks(group.module):
        if any(p.requires_grad for p in bank.parameters()):
            names = [name for name, module in group.module.named_modules() if module is bank]
            raise UnsupportedError(
                f"{group.name}.{names[0]}: experts see the tokens of all rows mixed together, so samples cannot be "
                "separated: put adapters on attention and on modules that see every token"
            )
