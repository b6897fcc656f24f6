"""Adapter types that PEFT cannot put on weights quantised by bitsandbytes; tests/unit/engine/test_quantised.py."""

import torch
from torch import nn

from siftune.base.errors import AdapterError

_WIDENS = "computes in float32 there and hands that on to what computes in half precision"
_LOST = "loses the scales of the weights after the first pass on a processor"


def refuse_rounded(model: nn.Module, kind: str) -> None:
    """Refuse a kind on a base that is rounded, where PEFT's module cannot work on it.

    Raises:
        AdapterError: It cannot.
    """
    bits = next((bits for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)), None)
    if bits is None:
        return
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    half, on_processor = dtypes != {torch.float32}, next(model.parameters()).device.type == "cpu"
    reason = {
        ("ia3", 4): _WIDENS if half else None,
        ("ia3", 8): _WIDENS if half else None,
        ("dora", 8): _LOST if on_processor else None,
    }.get((kind, bits))
    if reason is not None:
        raise AdapterError(
            f"PEFT's {kind} {reason}, so that it cannot be put on a base in {bits} bits: leave quantize out, or take "
            "another adapter, such as lora"
        )
