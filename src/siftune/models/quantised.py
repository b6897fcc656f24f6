"""Bases quantised by bitsandbytes: loading, keeping 4-bit weights unpacked, and adapter types that do not work on them.

On processors with AVX-512 for bfloat16, bitsandbytes packs 4-bit weights for inference. It does so in the first pass in
eval mode whose input needs no gradient, such as an evaluation or a comparison of layers. No gradient comes through a
packed matrix, with a warning at most, and shapes that its blocks do not divide fail.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from siftune.base.errors import AdapterError, ModelError, UnsupportedError

_SWITCH = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit: whether it packs
_PACKED = "packing_format_for_cpu"  # of its weight's state: whether it is packed

_unpacked: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # matrix -> number of `KeptUnpacked` on it


class KeptUnpacked:
    """Prevents the packing of all matrices of a model until `remove()`.

    Args:
        model: A model, quantised or not, without packed matrices.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: Sequence[nn.Module] = [
            m for m in model.modules() if m in _unpacked or getattr(m, _SWITCH, False)
        ]
        for module in self._modules:
            _unpacked[module] = _unpacked.get(module, 0) + 1
            setattr(module, _SWITCH, False)

    def remove(self) -> None:
        """Allow packing again, unless another `KeptUnpacked` prevents it; a second call does nothing."""
        for module in self._modules:
            _unpacked[module] -= 1
            if not _unpacked[module]:
                del _unpacked[module]
                setattr(module, _SWITCH, True)
        self._modules = ()


def refuse_packed(model: nn.Module) -> None:
    """Refuse a model with packed matrices.

    Raises:
        UnsupportedError: A matrix is packed.
    """
    for name, module in model.named_modules():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), _PACKED, False):
            raise UnsupportedError(
                f"bitsandbytes has packed the 4-bit weights of {name} for inference, in a pass in eval mode, and no "
                "gradient comes through them any more: load the model again, and evaluate or generate nothing before "
                "training"
            )


def quantization(kind: str | None, half: torch.dtype) -> dict[str, Any]:
    """Return `from_pretrained`'s arguments for "4bit" (NF4 with double quantisation, as in QLoRA), "8bit" or None.

    Args:
        kind: What to quantise to.
        half: Dtype that 4-bit matrices compute in.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if kind is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("quantize needs bitsandbytes, which is not installed: `pip install bitsandbytes`")
    from transformers import BitsAndBytesConfig

    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": half}
    config = BitsAndBytesConfig(load_in_4bit=True, **four) if kind == "4bit" else BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config}


def refuse_on_quantised(model: nn.Module, kind: str) -> None:
    """Refuse an adapter type whose module in PEFT cannot work on this quantised base.

    Raises:
        AdapterError: It cannot.
    """
    bits = next((bits for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)), None)
    if bits is None:
        return
    half = {p.dtype for p in model.parameters() if p.is_floating_point()} != {torch.float32}
    reason = None
    if kind == "ia3" and half:
        reason = "computes in float32 there and passes that to modules in half precision"
    if (kind, bits) == ("dora", 8) and next(model.parameters()).device.type == "cpu":
        reason = "loses the scales of the weights after the first pass on a processor"
    if reason is not None:
        raise AdapterError(
            f"PEFT's {kind} {reason}, so that it cannot be put on a base in {bits} bits: leave quantize out, or take "
            "another adapter, such as lora"
        )
