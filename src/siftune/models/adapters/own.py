"""What kinds of adapters that PEFT lacks share: tuners of PEFT's that put a layer of ours around a module of the model.

So their folders are saved, loaded and resumed like any other's once `register` has told PEFT, as attaching and loading
here do. None of them can be merged.
"""

from typing import Any, NoReturn

from peft import PeftConfig, mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn


class OwnLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A module of the model, and adapters that change what it gives, of which `active` is used."""

    unmergeable = ""

    def __init__(self, base_layer: nn.Module, active: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._active_adapter = active

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse: there is no weight that does the same."""
        raise ValueError(self.unmergeable)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Give the module back as it was."""
        if merge:
            self.merge()
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        """What the module has, where a model looks into it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        """PEFT's, which looks for a weight, and where there is none that of the module's first parameter."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        first = next((p for p in base_layer.parameters() if p.is_floating_point()), None)
        return (device, dtype) if device is not None or first is None else (first.device, first.dtype)


class OwnTuner(BaseTuner):  # type: ignore[misc]
    """PEFT's tuner that puts such layers around the modules that a config names."""

    tuner_layer_cls: type[OwnLayer]
    target_module_mapping: dict[str, list[str]] = {}  # none: a config names its own  # noqa: RUF012

    def put_in(self, layer: OwnLayer, target: nn.Module, name: str, target_name: str, parent: nn.Module) -> None:
        """Put a layer in the place of the module that it is around, after an adapter `name` was added to it."""
        if layer is not target:
            if name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(parent, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's looks for a weight, which not every module has

    def _check_merge_allowed(self) -> None:
        """Let the layers refuse."""
        next(module for module in self.model.modules() if isinstance(module, OwnLayer)).merge()


def register() -> None:
    """Tell PEFT of these kinds, so that it loads folders that hold them; calling it twice does no harm."""
    from siftune.models.adapters import bottleneck

    kinds: list[tuple[str, type[PeftConfig], type[OwnTuner]]] = [
        (bottleneck.TYPE, bottleneck.BottleneckConfig, bottleneck.BottleneckModel),
    ]
    for name, config, tuner in kinds:
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = config
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = tuner.prefix
