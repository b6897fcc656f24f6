"""Prefixes: keys and values of each layer's own that every token attends to, before those of the tokens.

    head_h = attention(q_h, [P_k,h ; K_h], [P_v,h ; V_h])

Li and Liang 2021 (arXiv 2101.00190), in the form that He et al. 2022 (arXiv 2110.04366, §2.1) write down: per layer and
head n keys and n values, which are the parameters themselves, no network that makes them, and no tokens in the prompt.

    n            `rank`, 30 where none is given
    P_k, P_v     (heads of keys, n, size of a head), one of each in every layer

PEFT's prefix tuning holds all layers' in one matrix outside of them, so that no layer can be chosen; this one is a
tuner of PEFT's of type LAYER_PREFIX, in the layers.

Ours: tokens keep their positions, and P_k is given none, so that the model without prefixes is the base exactly; every
token sees all of the prefix, also where a family's attention looks back a window only; P_v begins at zero and P_k by
N(0, 0.02²): the start is the base whose heads attend to n empty keys as well, which is near it in long rows.
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import Tensor, nn

from siftune.base.errors import AdapterError
from siftune.models.adapters.attach import is_mamba, short_names
from siftune.models.adapters.own import OwnLayer, OwnTuner, register
from siftune.models.adapters.registry import CARRIERS, Shape
from siftune.models.layers import hidden_states, inside
from siftune.models.sublayers import find_sublayers

TYPE = "LAYER_PREFIX"
CACHES = ("cache", "past_key_values", "layer_past")  # what attentions call what holds the keys and values of the past


@dataclass
class PrefixConfig(PeftConfig):  # type: ignore[misc]
    """PEFT's config of prefixes; its fields are what adapter_config.json says.

    Attributes:
        r: Keys and values in each layer.
        target_modules: The attentions.
    """

    r: int = 30
    target_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE


class _Prefixed:
    """A cache that stands before another, or before none: what it gives has a prefix, what it holds has not."""

    def __init__(self, behind: Any, keys_BHND: Tensor, values_BHND: Tensor) -> None:
        self._behind, self._keys, self._values = behind, keys_BHND, values_BHND

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values; give all, (B, H, n + T, D)."""
        if self._behind is not None:
            keys, values = self._behind.update(keys, values, *args, **kwargs)
        if keys.shape[1] != self._keys.shape[1] or keys.shape[3] != self._keys.shape[3] or values.shape != keys.shape:
            raise AdapterError(
                f"an attention has keys of shape {tuple(keys.shape)} and values of shape {tuple(values.shape)}, and a "
                f"prefix has {self._keys.shape[1]} heads of size {self._keys.shape[3]}, as the model's config says: "
                "take another adapter, such as lora"
            )
        return torch.cat((self._keys.to(keys), keys), 2), torch.cat((self._values.to(values), values), 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)


class PrefixLayer(OwnLayer):
    """An attention, and keys and values before its own."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("prefix_keys", "prefix_values")
    other_param_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base_layer: nn.Module, active: str) -> None:
        super().__init__(base_layer, active)
        self.unmergeable = CARRIERS["prefix"].unmergeable or ""
        self.prefix_keys, self.prefix_values = nn.ParameterDict(), nn.ParameterDict()
        self._shapes: dict[str, torch.Size] = {}
        self._cache = next((name for name in CACHES if name in signature(base_layer.forward).parameters), "")
        if not self._cache:
            raise AdapterError(
                f"{type(base_layer).__name__} keeps no keys and values of the past, so that a prefix has no place in "
                "it; take another adapter, such as lora"
            )

    def add(self, name: str, config: PrefixConfig, heads: int, size: int) -> None:
        """Put in an adapter."""
        self.prefix_keys[name] = nn.Parameter(0.02 * torch.randn(heads, config.r, size))
        self.prefix_values[name] = nn.Parameter(torch.zeros(heads, config.r, size))
        self._shapes[name] = self.prefix_keys[name].shape
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the attention gives when its tokens see the prefix as well."""
        names = [name for name in self.active_adapters if name in self.prefix_keys]
        if self.disable_adapters or not names:
            return self.base_layer(*args, **kwargs)
        hidden_BTC = hidden_states(args, kwargs)
        keys, values = (
            torch.cat([self._of_rows(part[name], name, len(hidden_BTC)) for name in names], 2)
            for part in (self.prefix_keys, self.prefix_values)
        )
        wider: dict[str, Any] = {self._cache: _Prefixed(kwargs.get(self._cache), keys, values)}
        wider["attention_mask"] = self._seen(kwargs.get("attention_mask"), keys.shape[2], hidden_BTC)
        if kwargs.get("alibi") is not None:
            wider["alibi"] = nn.functional.pad(kwargs["alibi"], (keys.shape[2], 0))
        return self.base_layer(*args, **{**kwargs, **wider})

    def _of_rows(self, values: Tensor, name: str, rows: int) -> Tensor:
        """(B, heads, n, size) of a parameter, or of what `engine.tape` has in its place: a flat copy for each row."""
        return values.reshape(-1, *self._shapes[name]).expand(rows, -1, -1, -1)

    def _seen(self, mask: Any, count: int, hidden_BTC: Tensor) -> Tensor | None:
        """The attention mask with the prefix before it."""
        implementation = getattr(getattr(self.base_layer, "config", None), "_attn_implementation", "eager")
        if implementation not in ("eager", "sdpa"):
            raise AdapterError(
                f"attention is {implementation}, which takes no mask that a prefix could be put before: load the model "
                "with eager or sdpa (--attention)"
            )
        length = hidden_BTC.shape[1]
        if mask is None and length == 1:
            return None
        if mask is None:  # what sdpa does without one
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=hidden_BTC.device).tril()
        seen: Tensor = nn.functional.pad(mask, (count, 0), value=mask.dtype == torch.bool)
        return seen


class PrefixModel(OwnTuner):
    """PEFT's tuner that puts prefixes before the keys and values of attentions."""

    prefix = "prefix_"
    tuner_layer_cls = PrefixLayer

    def _create_and_replace(
        self, config: PrefixConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str,
    ) -> None:  # fmt: skip
        layer: Any = target if isinstance(target, PrefixLayer) else PrefixLayer(target, self.active_adapters[0])
        layer.add(adapter_name, config, *_heads(self.model))
        self.put_in(layer, target, adapter_name, target_name, parent)


def _heads(model: Any) -> tuple[int, int]:
    """Heads of keys, and size of a head."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def prefix(model: nn.Module, shape: Shape) -> PrefixConfig:
    """Config of prefixes in all attentions, or in those of some layers.

    Raises:
        AdapterError: Modules are named, or the layers have no attention.
    """
    attentions = [place.reads for place in find_sublayers(model) if place.part == "attention"]
    places = [place for place in attentions if not is_mamba(model.get_submodule(place))]
    if shape.targets is not None or not places:
        what = "targets names modules" if places else f"the layers of {type(model).__name__} have no attention"
        raise AdapterError(f"{what}, but a prefix goes on attention: leave targets out, or take another adapter")
    chosen = inside(model, {place: model.get_submodule(place) for place in places}, shape.layers)
    register()
    assert shape.rank is not None  # filled in
    return PrefixConfig(task_type="CAUSAL_LM", r=shape.rank, target_modules=short_names(model, chosen))
