"""PEFT's configs of the LoRA family, IA3 and LN-tuning for a model.

LoRA (Hu et al., arXiv 2106.09685), rsLoRA (Kalajdzievski, 2312.03732) and DoRA (Liu et al., 2402.09353): PEFT's LoRA
with a flag each, also on the experts of a mixture.

IA3 (Liu et al., 2205.05638): keys, values and the input of the MLP's last module are each scaled by a vector. Ours: if
a family has one module for queries, keys and values, its complete output is scaled; experts of a mixture are not.

LN-tuning (Zhao et al., 2312.11420): copies of the norms' weights and biases train.
"""

from dataclasses import replace

from peft import IA3Config, LNTuningConfig, LoraConfig
from torch import nn

from siftune.base.errors import AdapterError
from siftune.models.adapters.registry import Shape
from siftune.models.adapters.targets import EXPERTS, chosen_linears, expert_weights, short_names, transposed
from siftune.models.layers import find_layers, find_sublayers, inside

_KEYS_AND_VALUES = ("k_proj", "v_proj")


def lora(model: nn.Module, shape: Shape, **flags: bool) -> LoraConfig:
    """Config of LoRA on the linear modules of the decoder layers, or on the targets.

    Raises:
        AdapterError: As `chosen_linears`.
    """
    experts = expert_weights(model, shape.layers) if EXPERTS in (shape.targets or ()) else []
    if experts:
        shape = replace(shape, targets=[target for target in shape.targets or () if target != EXPERTS])
    chosen = {} if experts and not shape.targets else chosen_linears(model, shape)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=short_names(model, chosen),
        target_parameters=experts or None,
        fan_in_fan_out=transposed(chosen),
        **flags,
    )


def rslora(model: nn.Module, shape: Shape) -> LoraConfig:
    """Config of rsLoRA, LoRA with the scale alpha/√rank."""
    return lora(model, shape, use_rslora=True)


def dora(model: nn.Module, shape: Shape) -> LoraConfig:
    """Config of DoRA, LoRA on the direction of the weights and a separate magnitude."""
    return lora(model, shape, use_dora=True)


def ia3(model: nn.Module, shape: Shape) -> IA3Config:
    """Config of IA3 on keys, values and the MLP, or on the targets.

    Raises:
        AdapterError: As `chosen_linears`.
    """
    chosen = chosen_linears(model, shape)
    places = find_sublayers(model)
    inputs = {place.writes for place in places if place.part == "mlp"}
    if shape.targets is None:
        outputs = {place.writes for place in places if place.part == "attention"}
        separate = {name for name in chosen if name.endswith(_KEYS_AND_VALUES)}
        fused = {n for n in chosen for place in places if place.part == "attention" and n.startswith(place.reads + ".")}
        wanted = inputs | (separate or fused - outputs)
        chosen = {name: module for name, module in chosen.items() if name in wanted}
    names = short_names(model, chosen)
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=names,
        feedforward_modules=[end for end in names if any(name.endswith(end) for name in inputs & chosen.keys())],
        fan_in_fan_out=transposed(chosen),
    )


def ln(model: nn.Module, shape: Shape) -> LNTuningConfig:
    """Config of LN-tuning on all norms of the decoder layers that have weights, or on the targets.

    Raises:
        AdapterError: There is no norm, or none of that name.
    """
    path = find_layers(model).path
    norms = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(f"{path}.")
        and type(module).__name__.endswith("Norm")
        and module._parameters.get("weight") is not None
    }
    ends = tuple(shape.targets or ("",))
    chosen = {name: module for name, module in norms.items() if name.endswith(ends)}
    if not chosen:
        leaves = sorted({name.rpartition(".")[2] for name in norms})
        raise AdapterError(
            f"no norm with weights in the layers of {type(model).__name__} is called {' or '.join(ends)}; available: "
            f"{', '.join(leaves) or 'none'}"
        )
    chosen = inside(model, chosen, shape.layers)
    return LNTuningConfig(task_type="CAUSAL_LM", target_modules=short_names(model, chosen))
