"""A tiny model whose decoder layers hold linear modules of bitsandbytes."""

from typing import Any

import torch
from support.tiny import tiny
from torch import nn

# it rounds 64 values together, and its kernels take 32 outputs at a time
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16}


def rounded(bits: int) -> nn.Module:
    """A Llama in 4 or 8 bits, on the CPU, that says so as transformers' do."""
    model = tiny("llama", **SIZES)
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, (_in_4_bits if bits == 4 else _in_8_bits)(module).to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def _in_4_bits(plain: nn.Linear) -> Any:
    import bitsandbytes as bnb

    module = bnb.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, compute_dtype=torch.float32)
    module.weight = bnb.nn.Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type="nf4", module=module)
    return module


def _in_8_bits(plain: nn.Linear) -> Any:
    import bitsandbytes as bnb

    module = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, bias=False, has_fp16_weights=False)
    module.weight = bnb.nn.Int8Params(plain.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    return module
