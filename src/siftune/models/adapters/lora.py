"""LoRA, rsLoRA and DoRA, which PEFT's LoRA is with a flag each; also on the experts of a mixture."""

from dataclasses import replace

from peft import LoraConfig
from torch import nn

from siftune.models.adapters.attach import EXPERTS, chosen_linears, expert_weights, short_names, transposed
from siftune.models.adapters.registry import Shape


def lora(model: nn.Module, shape: Shape, **flags: bool) -> LoraConfig:
    """PEFT's config of a LoRA on the linear modules of the decoder layers, or on those that are named."""
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
        init_lora_weights=True if shape.init == "default" else shape.init,
        fan_in_fan_out=transposed(chosen),
        **flags,
    )


def rslora(model: nn.Module, shape: Shape) -> LoraConfig:
    """The same with the scale alpha/√rank."""
    return lora(model, shape, use_rslora=True)


def dora(model: nn.Module, shape: Shape) -> LoraConfig:
    """The same with the magnitude apart from the direction."""
    return lora(model, shape, use_dora=True)
