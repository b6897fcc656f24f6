"""Series and parallel adapters: a small network of one hidden layer after, or beside, attention and MLP.

    series       h ← h + s · (ReLU(h W_down + b_down) W_up + b_up)      h: what a sublayer adds to the residual stream
    parallel     h ← h + s · (ReLU(x W_down + b_down) W_up + b_up)      x: what the sublayer is given

Series: Houlsby et al. 2019 (arXiv 1902.00751, §2.1), after attention and after the MLP, with biases, so that an adapter
has 2md + d + m parameters (bottleneck m, hidden size d). Pfeiffer et al. 2020 (arXiv 2005.00247) put one after the MLP
alone: `targets=["mlp"]`. Parallel and the scale s: He et al. 2022 (arXiv 2110.04366), beside the MLP, with s = 4.
LLM-Adapters (arXiv 2304.01933) has both in language models, bottleneck 256.

Ours: h is what the sublayer writes, before any norm or dropout that a family has there; s is alpha/rank, rank being the
bottleneck's width, so that alpha means what it does for LoRA, and scales b_up too; W_up and both
biases begin at zero, so that the start is the base exactly (Houlsby et al.: near it), and W_down as torch's linear
modules do; dropout is on the network's input; several adapters in one place are added up.

PEFT has no such kind. This one is a tuner of PEFT's of type BOTTLENECK; see `own`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from siftune.base.errors import AdapterError
from siftune.models.adapters.attach import short_names
from siftune.models.adapters.own import OwnLayer, OwnTuner, register
from siftune.models.adapters.registry import CARRIERS, Shape
from siftune.models.layers import hidden_states, inside
from siftune.models.sublayers import PARTS, find_sublayers

TYPE = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """PEFT's config of bottleneck adapters; its fields are what adapter_config.json says.

    Attributes:
        r: Width of the bottleneck.
        alpha: Numerator of the scale alpha/r.
        dropout: Probability of zeroing an input.
        parallel: Beside the sublayer rather than after it.
        target_modules: The modules by which sublayers write.
    """

    r: int = 256
    alpha: float = 256
    dropout: float = 0.0
    parallel: bool = False
    target_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE


class BottleneckLayer(OwnLayer):
    """The module by which a sublayer writes, and bottlenecks after it or beside the sublayer.

    Its response, all that it adds to what the module gives, is proportional to `scaling`. `width` is the size of the
    hidden states.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("bottleneck_down", "bottleneck_up")
    other_param_names: ClassVar[tuple[str, ...]] = ("bottleneck_dropout", "scaling", "parallel")

    def __init__(self, base_layer: nn.Module, width: int, active: str) -> None:
        super().__init__(base_layer, active)
        self.unmergeable = CARRIERS["series"].unmergeable or ""
        self.width = width
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.parallel: dict[str, bool] = {}
        self._given: Tensor | None = None
        self._watch: RemovableHandle | None = None

    def add(self, name: str, config: BottleneckConfig, reads: nn.Module) -> None:
        """Put in an adapter, which begins as no change; `reads` is the module that is given the sublayer's input."""
        down, up = nn.Linear(self.width, config.r), nn.Linear(config.r, self.width)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[name], self.bottleneck_up[name] = down, up
        self.bottleneck_dropout[name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.scaling[name] = config.alpha / config.r
        self.parallel[name] = config.parallel
        if config.parallel and self._watch is None and reads is not self.base_layer:
            self._watch = reads.register_forward_pre_hook(self._keep, with_kwargs=True)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives, with the bottlenecks' responses added to its first tensor."""
        given, self._given = self._given, None
        base = self.base_layer(*args, **kwargs)
        written = base if isinstance(base, Tensor) else base[0]
        if self.disable_adapters:
            return base
        if self._watch is None:  # the module is the sublayer itself
            given = hidden_states(args, kwargs)
        hidden = written
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                values = given if self.parallel[name] else written
                if values is None:
                    raise AdapterError(
                        "a sublayer writes without having been given hidden states since it wrote last, so a parallel "
                        "bottleneck has no input there; take series, or lora"
                    )
                hidden = hidden + self._response(name, values).to(hidden.dtype).view_as(hidden)
        return hidden if isinstance(base, Tensor) else (hidden, *base[1:])

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Give the module back as it was."""
        base = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        if self._watch is not None:
            self._watch.remove()
        return base

    def _keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run before the module that is given the sublayer's input."""
        self._given = hidden_states(args, kwargs)

    def _response(self, name: str, values: Any) -> Tensor:
        down: Any = self.bottleneck_down[name]
        dropped = self.bottleneck_dropout[name](self._cast_input_dtype(values, down.weight.dtype))
        up: Any = self.bottleneck_up[name]
        response: Tensor = up(torch.relu(down(dropped))) * self.scaling[name]
        return response


class BottleneckModel(OwnTuner):
    """PEFT's tuner that puts bottlenecks on the modules by which sublayers write."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self._reads = {part.writes: model.get_submodule(part.reads) for part in find_sublayers(model)}

    def _create_and_replace(
        self, config: BottleneckConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str,
    ) -> None:  # fmt: skip
        if current_key not in self._reads:
            raise AdapterError(f"{current_key} is no module by which attention or an MLP writes; give other targets")
        layer: Any = target
        if not isinstance(target, BottleneckLayer):
            layer = BottleneckLayer(target, _width(self.model, target), self.active_adapters[0])
        layer.add(adapter_name, config, self._reads[current_key])
        self.put_in(layer, target, adapter_name, target_name, parent)


def _width(model: Any, module: nn.Module) -> int:
    """Size of the hidden states that a module writes."""
    own = getattr(module, "out_features", None) or getattr(module, "nf", None)
    return int(own or model.config.get_text_config().hidden_size)


def series(model: nn.Module, shape: Shape) -> BottleneckConfig:
    """Config of bottlenecks after attention and the MLP, or after what is named."""
    return _config(model, shape, shape.targets or PARTS, parallel=False)


def parallel(model: nn.Module, shape: Shape) -> BottleneckConfig:
    """Config of bottlenecks beside the MLP, or beside what is named."""
    return _config(model, shape, shape.targets or ("mlp",), parallel=True)


def _config(model: nn.Module, shape: Shape, parts: Sequence[str], parallel: bool) -> BottleneckConfig:
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise AdapterError(f"targets names {unknown[0]}, but bottlenecks go on {' and '.join(PARTS)}: name these")
    places = [place.writes for place in find_sublayers(model) if place.part in parts]
    if not places:
        raise AdapterError(
            f"the layers of {type(model).__name__} have no {' or '.join(parts)} that is known by its name, so a "
            "bottleneck has no place there; give other targets, or an adapter on linear modules, such as lora"
        )
    chosen = inside(model, {place: model.get_submodule(place) for place in places}, shape.layers)
    register()
    assert shape.rank is not None
    assert shape.alpha is not None  # filled in
    return BottleneckConfig(
        task_type="CAUSAL_LM",
        r=shape.rank,
        alpha=shape.alpha,
        dropout=shape.dropout,
        parallel=parallel,
        target_modules=short_names(model, chosen),
    )
