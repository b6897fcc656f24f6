"""Attach adapters."""

from collections.abc import Sequence

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from siftune.errors import AdapterError
from siftune.models.full import layer_numbers, refuse_adapters
from siftune.models.layers import find_layers
from siftune.models.targets import layer_linears, named_modules, short_names

KINDS = ("lora", "rslora", "dora")


def default_alpha(kind: str, rank: int) -> int:
    """Numerator of the adapter response's scale where none is given (ours).

    2·rank, a scale of 2, for LoRA and DoRA; 16 whatever the rank for rsLoRA, whose point is that the scale falls with
    √rank only.
    """
    return 16 if kind == "rslora" else 2 * rank


def attach_adapter(
    model: nn.Module,
    kind: str = "lora",
    rank: int = 32,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> PeftModel:
    """Attach a LoRA, rsLoRA or DoRA adapter to a causal language model, in place.

    Adapter weights are float32 whatever the dtype of the base; see `use_base_dtype` to compute in the base's.

    Args:
        model: A transformers model without adapters.
        kind: "lora", "rslora" (response scaled by alpha/√rank) or "dora" (direction and magnitude apart).
        rank: Rank of the matrices A (rank, in) and B (out, rank).
        alpha: Numerator of the response's scale. None stands for 2·rank, a scale of 2 (LoRA and DoRA), or for
            16 whatever the rank (rsLoRA, whose point is that the scale falls with √rank only).
        dropout: Probability of zeroing an input of A, in [0, 1).
        targets: Names, or ends of dotted names, of the modules to adapt. None stands for every linear module of
            the decoder layers, attention and MLP, but for what `targets.layer_linears` leaves out: experts and
            routers of a mixture, modules that PEFT takes for experts, most of Mamba's mixers.
        layers: Numbers of the decoder layers that get adapters, from 0, negative ones from the end. None stands for
            all of them.

    Raises:
        AdapterError: A setting is out of range, the model has adapters already, or a target names no module.
        LayerError: There is no such layer; or the decoder layers cannot be found, and `targets` is None or `layers`
            is not.

    Example:
        >>> tuned = attach_adapter(base, rank=8, targets=["q_proj", "v_proj"])
        >>> sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        2304
    """
    if kind not in KINDS:
        raise AdapterError(f"unknown kind of adapter {kind!r}; known: {', '.join(KINDS)}")
    if rank < 1 or not 0 <= dropout < 1:
        raise AdapterError(f"rank must be ≥ 1 and dropout in [0, 1); found rank={rank}, dropout={dropout}")
    refuse_adapters(model)
    chosen = layer_linears(model) if targets is None else named_modules(model, targets)
    if layers is not None:
        chosen = _inside(model, chosen, layers)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=default_alpha(kind, rank) if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=short_names(model, chosen),
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in chosen.values()),
    )
    return get_peft_model(model, config)


def _inside(model: nn.Module, modules: dict[str, nn.Module], layers: Sequence[int]) -> dict[str, nn.Module]:
    """Keep the modules that are in some layers."""
    found = find_layers(model)
    places = tuple(f"{found.path}.{number}." for number in layer_numbers(len(found.layers), layers))
    kept = {name: module for name, module in modules.items() if name.startswith(places)}
    if not kept:
        raise AdapterError(
            f"none of the modules that `targets` names is in the layers {', '.join(map(str, layers))}; give other "
            "targets or layers"
        )
    return kept
