"""Series and parallel adapters: a small network of one hidden layer after, or beside, attention and MLP.

    series       h ← h + s · (ReLU(h W_down + b_down) W_up + b_up)      h: the output of a sublayer
    parallel     h ← h + s · (ReLU(x W_down + b_down) W_up + b_up)      x: its input

Series: Houlsby et al. 2019 (arXiv 1902.00751, §2.1), after attention and after the MLP, with biases, so that an adapter
has 2md + d + m parameters (bottleneck m, hidden size d). Pfeiffer et al. 2020 (arXiv 2005.00247) put one after the MLP
alone: `targets=["mlp"]`. Parallel and the scale s: He et al. 2022 (arXiv 2110.04366), beside the MLP, with s = 4.
LLM-Adapters (arXiv 2304.01933) has both in language models, bottleneck 256.

Ours: h is taken before any norm or dropout that a family has there. s is alpha/rank, rank being the bottleneck's width,
so that alpha means the same as for LoRA; it scales b_up too. W_up and both biases are initialised to zero, so that the
start is the base exactly (Houlsby et al.: near it), and W_down as torch's linear modules are. Dropout is on the
network's input. Several adapters in one place are summed.

PEFT has no such adapter. This one is a PEFT tuner of type BOTTLENECK: its folders are saved, loaded and resumed like
any other's after `register`, which attaching and loading call. It cannot be merged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from siftune.base.errors import AdapterError
from siftune.models.adapters.registry import ADAPTER_TYPES, Shape
from siftune.models.adapters.targets import short_names
from siftune.models.layers import PARTS, find_sublayers, hidden_states, inside

TYPE = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]
    """PEFT's config of bottleneck adapters; its fields are those of adapter_config.json.

    Attributes:
        r: Width of the bottleneck.
        alpha: Numerator of the scale alpha/r.
        dropout: Probability of zeroing an input.
        parallel: Beside the sublayer rather than after it.
        target_modules: The modules through which sublayers write.
    """

    r: int = 256
    alpha: float = 256
    dropout: float = 0.0
    parallel: bool = False
    target_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TYPE


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """The module through which a sublayer writes, with bottlenecks after it or beside the sublayer.

    Their response, the change of the module's output, is proportional to `scaling`.

    Args:
        base_layer: The module.
        width: Size of the hidden states.
        active: Name of the active adapter.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ("bottleneck_down", "bottleneck_up")
    other_param_names: ClassVar[tuple[str, ...]] = ("bottleneck_dropout", "scaling", "parallel")

    def __init__(self, base_layer: nn.Module, width: int, active: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._active_adapter = active
        self.width = width
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.parallel: dict[str, bool] = {}
        self._input: Tensor | None = None  # of the sublayer, for parallel bottlenecks
        self._hook: RemovableHandle | None = None

    def add(self, name: str, config: BottleneckConfig, reads: nn.Module) -> None:
        """Add an adapter, initially without effect; `reads` is the module that receives the sublayer's input."""
        down, up = nn.Linear(self.width, config.r), nn.Linear(config.r, self.width)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[name], self.bottleneck_up[name] = down, up
        self.bottleneck_dropout[name] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.scaling[name], self.parallel[name] = config.alpha / config.r, config.parallel
        if config.parallel and self._hook is None and reads is not self.base_layer:
            self._hook = reads.register_forward_pre_hook(self._keep_input, with_kwargs=True)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output, with the bottlenecks' responses added to its first tensor."""
        entering, self._input = self._input, None
        base = self.base_layer(*args, **kwargs)
        written = base if isinstance(base, Tensor) else base[0]
        if self.disable_adapters:
            return base
        if self._hook is None:  # the module is the sublayer itself
            entering = hidden_states(args, kwargs)
        hidden = written
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                values = entering if self.parallel[name] else written
                if values is None:
                    raise AdapterError(
                        "a sublayer writes twice after one input, so a parallel bottleneck has no input there; take "
                        "series, or lora"
                    )
                hidden = hidden + self._response(name, values).to(hidden.dtype).view_as(hidden)
        return hidden if isinstance(base, Tensor) else (hidden, *base[1:])

    def _keep_input(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input = hidden_states(args, kwargs)

    def _response(self, name: str, values: Any) -> Tensor:
        down: Any = self.bottleneck_down[name]
        dropped = self.bottleneck_dropout[name](self._cast_input_dtype(values, down.weight.dtype))
        up: Any = self.bottleneck_up[name]
        response: Tensor = up(torch.relu(down(dropped))) * self.scaling[name]
        return response

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse: no weight does the same."""
        raise ValueError(ADAPTER_TYPES["series"].unmergeable)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module without bottlenecks and hook."""
        if merge:
            self.merge()
        if self._hook is not None:
            self._hook.remove()
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module, which a model may look for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        """Return PEFT's, which looks for a weight; without one, those of the module's first parameter."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        first = next((p for p in base_layer.parameters() if p.is_floating_point()), None)
        return (device, dtype) if device is not None or first is None else (first.device, first.dtype)


class BottleneckModel(BaseTuner):  # type: ignore[misc]
    """PEFT tuner that puts bottlenecks on the modules through which sublayers write."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 a config names its own modules

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self._reads = {part.writes: model.get_submodule(part.reads) for part in find_sublayers(model)}

    def _create_and_replace(
        self, config: BottleneckConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str,
    ) -> None:  # fmt: skip
        if current_key not in self._reads:
            raise AdapterError(f"{current_key} is no output module of attention or an MLP; give other targets")
        if isinstance(target, BottleneckLayer):
            target.add(adapter_name, config, self._reads[current_key])
            return
        width = getattr(target, "out_features", None) or getattr(target, "nf", None)
        layer = BottleneckLayer(
            target, int(width or self.model.config.get_text_config().hidden_size), self.active_adapters[0]
        )
        layer.add(adapter_name, config, self._reads[current_key])
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        setattr(parent, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's looks for a weight, which not every module has

    def _check_merge_allowed(self) -> None:
        """Refuse, as the layers do."""
        next(module for module in self.model.modules() if isinstance(module, BottleneckLayer)).merge()


def register() -> None:
    """Register the tuner with PEFT, so that it loads folders of this type; a second call does nothing."""
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[TYPE] = BottleneckConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[TYPE] = BottleneckModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[TYPE] = BottleneckModel.prefix


def series(model: nn.Module, shape: Shape) -> BottleneckConfig:
    """Config of bottlenecks after attention and the MLP, or after the targets."""
    return _config(model, shape, shape.targets or PARTS, parallel=False)


def parallel(model: nn.Module, shape: Shape) -> BottleneckConfig:
    """Config of bottlenecks beside the MLP, or beside the targets."""
    return _config(model, shape, shape.targets or ("mlp",), parallel=True)


def _config(model: nn.Module, shape: Shape, parts: Sequence[str], parallel: bool) -> BottleneckConfig:
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise AdapterError(f"targets names {unknown[0]}, but bottlenecks belong on {' and '.join(PARTS)}: name these")
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
