"""Suppression of adapters' response, by which IST compares candidate sets."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from siftune.base.errors import AdapterError
from siftune.engine.groups import LayerGroup
from siftune.engine.substitution import Substitution
from siftune.models.adapters.bottleneck import BottleneckLayer
from siftune.models.adapters.full import original_weights
from siftune.models.modules import expert_count

_TAKE_APART = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of PEFT's init_lora_weights


@contextmanager
def suppress(groups: Sequence[LayerGroup], indices: Iterable[int], factor: float) -> Iterator[None]:
    """Multiply the adapters' response in some layers by `factor`.

    The response of an adapted module is its output minus the output of its base layer for the same input. For plain
    LoRA and bottlenecks the scale is changed; for DoRA and every other PEFT adapter a hook computes
    base + factor·(output − base). Layers with trainable weights of their own (`full.OpenLayers`) run with
    W₀ + factor·(W − W₀) instead of W (ours): linear and norm modules are linear in W, so that this damps their response
    in the same way. Everything is restored bit for bit when the block ends, also after an error.

    Args:
        groups: Layers, as `group_by_layer` returns them.
        indices: Positions in `groups` of the layers to damp.
        factor: 1 changes nothing, 0 is the base model.

    Raises:
        AdapterError: A layer has neither a PEFT adapter nor original weights, or its adapters are merged into the base.
    """
    chosen = [groups[index] for index in dict.fromkeys(indices)]
    modules = [m for group in chosen if original_weights(group.module) is None for m in adapted_modules(group)]
    with ExitStack() as undo:
        for group in chosen:
            _damp_weights(group, factor, undo)
        for module in modules:
            if is_scaled(module):
                saved = {name: module.scaling[name] for name in module.active_adapters if name in module.scaling}
                undo.callback(module.scaling.update, saved)
                module.scaling.update({name: scale * factor for name, scale in saved.items()})
            else:
                undo.callback(module.register_forward_hook(partial(_damp, factor), with_kwargs=True).remove)
        yield


def _damp_weights(group: LayerGroup, factor: float, undo: ExitStack) -> None:
    """Replace an open layer's weights by W₀ + factor·(W − W₀); other layers are unchanged."""
    originals = original_weights(group.module)
    if originals is None:
        return
    substitution = Substitution(group)
    undo.callback(substitution.restore)
    # lerp is exact for factors 0 and 1
    substitution.swap(lambda slot, now: torch.lerp(originals[slot.parameter].to(now), now, factor))


def adapted_modules(group: LayerGroup) -> list[Any]:
    """Return a layer's outermost PEFT modules, and check that they have a response.

    Raises:
        AdapterError: It has none, or one without a response.
    """
    adapted: dict[str, Any] = {}
    for name, module in group.module.named_modules():
        if isinstance(module, BaseTunerLayer) and not any(name.startswith(outer + ".") for outer in adapted):
            adapted[name] = module
            if module.merged:
                raise AdapterError(
                    f"{group.name}.{name}: adapter {', '.join(module.merged_adapters)} is merged into the "
                    "base, so it has no separate response: call unmerge_adapter() first"
                )
            if not hasattr(module, "base_layer"):
                raise AdapterError(
                    f"{group.name}.{name}: {type(module).__name__} keeps no base layer, so its response is "
                    "unknown: use LoRA, rsLoRA or DoRA, or a method that does not damp responses, such as RST"
                )
    if not adapted:
        raise AdapterError(
            f"{group.name} has no PEFT adapter whose response could be damped: attach one, open the layer with "
            "siftune.models.adapters.full.OpenLayers before training, or use RST, which damps nothing"
        )
    return list(adapted.values())


def refuse_taken_apart(model: nn.Module) -> None:
    """Refuse adapters that are initialized from the base's weights, whose response differs from their output.

    Raises:
        AdapterError: There is one.
    """
    for config in getattr(model, "peft_config", {}).values():
        init = str(getattr(config, "init_lora_weights", "")).lower()
        if init.startswith(_TAKE_APART):
            raise AdapterError(
                f"an adapter initialized with {init} holds a part of the base, so that its response cannot be damped: "
                "use another method, or another init_lora_weights"
            )


def is_scaled(module: Any) -> bool:
    """Whether the response of a PEFT module is proportional to its scale and nothing else."""
    return isinstance(module, BottleneckLayer) or (
        isinstance(module, LoraLayer)
        # these put the product of the matrices into a weight, and their output is not linear in it
        and not isinstance(module, MultiheadAttention)
        # a router returns its choice of experts beside its logits, so that its output cannot be damped
        and not (isinstance(module, ParamWrapper) and expert_count(module.get_base_layer()))
        and not isinstance(module.base_layer, BaseTunerLayer)
        and not any(name in module.lora_variant for name in module.active_adapters)
    )


# arguments of attention and mixers that hold a cache, and PEFT's own, which base layers do not know
_LEFT_OUT = ("cache", "past_key_values", "layer_past", "adapter_names", "alora_offsets")


def base_output(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Output of an adapted module's base for the same input, without caches, which stay unchanged."""
    return module.get_base_layer()(*args, **{name: v for name, v in kwargs.items() if name not in _LEFT_OUT})


def states(output: Any) -> Tensor:
    """The hidden states of a module's output; attention modules return further values after them."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _damp(factor: float, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook: base + factor·(output − base), exact for factors 0 and 1."""
    damped = torch.lerp(states(base_output(module, args, kwargs)), states(output), factor)
    return (damped, *output[1:]) if isinstance(output, tuple) else damped
