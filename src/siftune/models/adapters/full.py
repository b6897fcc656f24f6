"""Full training of some decoder layers: their own weights train, without adapters.

The weights W of these layers train in float32 whatever the base's dtype; see `substitution.use_base_dtype` to compute
in the base's. A copy of the initial weights, W₀, is optional. The *response* of such a layer's modules is the
difference of their outputs with W and with W₀. It can be damped as an adapter's is (ours; see `engine.suppression`).
"""

from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from siftune.base.errors import AdapterError
from siftune.models.adapters.attach import refuse_adapters
from siftune.models.layers import find_layers, layer_numbers

_originals: WeakKeyDictionary[nn.Module, dict[nn.Parameter, Tensor]] = WeakKeyDictionary()


class OpenLayers:
    """Layers whose own weights train, until `close()`; everything else in the model is frozen.

    Weights in half precision become float32 in place, so that small updates are not lost.

    Args:
        model: Causal language model without adapters.
        layers: Numbers of the layers, from 0; negative ones count from the end. None: all.
        originals: Keep a copy of the current weights in their dtype, which damping (IST) needs.

    Raises:
        LayerError: There is no such layer, or the layers cannot be found.
        AdapterError: The model has adapters, or a parameter that would train is quantised.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int] | None, originals: bool = True) -> None:
        refuse_adapters(model)
        stack = find_layers(model)
        depth = len(stack.layers)
        self.numbers = layer_numbers(depth, range(depth) if layers is None else layers)  # from 0, ascending
        self._layers = [stack.layers[number] for number in self.numbers]
        names = [f"{stack.path}.{number}" for number in self.numbers]
        self.parameters = {  # by name in the model's state dict
            f"{name}.{key}": parameter
            for name, layer in zip(names, self._layers, strict=True)
            for key, parameter in layer.named_parameters()
        }
        _refuse_quantised(self.parameters)
        self._dtypes = {name: parameter.dtype for name, parameter in self.parameters.items()}
        if originals:
            for layer in self._layers:
                _originals[layer] = {p: p.detach().clone() for p in layer.parameters()}
        model.requires_grad_(False)
        for parameter in self.parameters.values():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
            parameter.requires_grad_()

    def close(self) -> None:
        """Round the weights to their original dtype, and drop the copies; a second call does nothing."""
        for name, parameter in self.parameters.items():
            parameter.grad = None if parameter.dtype != self._dtypes[name] else parameter.grad
            parameter.data = parameter.data.to(self._dtypes[name])
        for layer in self._layers:
            _originals.pop(layer, None)


def original_weights(layer: nn.Module) -> Mapping[nn.Parameter, Tensor] | None:
    """Return the initial weights of an open layer, each in the shape of its parameter; None without copies."""
    return _originals.get(layer)


def _refuse_quantised(parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise AdapterError(
                f"{name} is kept as {str(parameter.dtype).removeprefix('torch.')}, which cannot train; load the model "
                "unquantised, or train adapters (lora)"
            )
