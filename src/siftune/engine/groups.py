"""Group a model's trainable parameters by decoder layer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import nn
from torch.distributed.tensor import DTensor

from siftune.base.errors import AdapterError, UnsupportedError
from siftune.models.layers import find_layers


@dataclass(frozen=True)
class LayerGroup:
    """A decoder layer and its trainable parameters.

    Attributes:
        index: Number of the layer, from the embeddings, from 0.
        name: Full path of the layer in the model.
        module: The layer.
        parameters: Its trainable parameters, by name relative to the layer.
    """

    index: int
    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]


def group_by_layer(model: nn.Module, path: str | None = None) -> list[LayerGroup]:
    """Group the trainable parameters (`requires_grad`) by decoder layer.

    Args:
        model: Causal language model, adapted or not, wrapped or not.
        path: Path of the decoder layers if their structure does not identify them; see `find_layers`.

    Returns:
        One group per layer that has trainable parameters, in the order of the layers.

    Raises:
        AdapterError: No layer has a trainable parameter.
        UnsupportedError: A parameter belongs to several layers or is sharded, or the adapter keeps its parameters
            outside of the layers (prompt and prefix tuning).
        LayerError: The layers cannot be found.
    """
    _refuse_prompts(model)
    stack = find_layers(model, path)
    names = {module: name for name, module in model.named_modules()}
    groups = []
    for index, layer in enumerate(stack.layers):
        trainable = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        if trainable:
            groups.append(LayerGroup(index, names[layer], layer, trainable))
    if not groups:
        raise AdapterError(
            f"none of the {len(stack.layers)} layers at {stack.path} has a trainable parameter; attach an "
            "adapter, e.g. with siftune.attach_adapter(model), and load saved adapters with is_trainable=True"
        )
    _refuse_sharing(groups)
    _refuse_sharded(groups)
    return groups


def refuse_allocator(groups: Iterable[LayerGroup]) -> None:
    """Refuse AdaLoRA for methods that choose layers or rows.

    Raises:
        UnsupportedError: A layer has it.
    """
    for group in groups:
        if any(isinstance(module, AdaLoraLayer) for module in group.module.modules()):
            raise UnsupportedError(
                f"{group.name} has AdaLoRA, which allocates its ranks by the gradients of all layers and rows in every "
                "step, so none can be left out: train densely, or use LoRA"
            )


def outside(model: nn.Module, groups: Iterable[LayerGroup]) -> dict[str, nn.Parameter]:
    """Return the model's trainable parameters that belong to no group, by full name."""
    inside = {id(p) for group in groups for p in group.parameters.values()}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside}


def _refuse_prompts(model: nn.Module) -> None:
    for module in model.modules():
        for config in module.peft_config.values() if isinstance(module, PeftModel) else ():
            if config.is_prompt_learning:
                raise UnsupportedError(
                    f"{config.peft_type} has no separate parameters in each layer: use LoRA, rsLoRA, DoRA or another "
                    "adapter inside the decoder layers"
                )


def _refuse_sharing(groups: Sequence[LayerGroup]) -> None:
    first: dict[int, str] = {}
    for group in groups:
        for name, parameter in group.parameters.items():
            full = f"{group.name}.{name}"
            if id(parameter) in first:
                raise UnsupportedError(
                    f"layers share a trainable parameter: {first[id(parameter)]} is {full}; layers can only "
                    "be chosen one by one if each has parameters of its own"
                )
            first[id(parameter)] = full


def _refuse_sharded(groups: Sequence[LayerGroup]) -> None:
    for group in groups:
        for name, parameter in group.parameters.items():
            if isinstance(parameter, DTensor):
                raise UnsupportedError(
                    f"{group.name}.{name} is sharded, and selection works on unsharded parameters: "
                    "siftune.shard_base(model) shards the base by FSDP2 and keeps trainable parameters unsharded"
                )
