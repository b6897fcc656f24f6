"""Bases quantised by bitsandbytes, where it is installed: LoRA and DoRA in them are recorded as in any other."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.adapted import shake
from support.oracles import sample_gradients, summed_loss
from support.tiny import batch, tiny

from siftune import GAST
from siftune.engine.groups import group_by_layer
from siftune.models.adapters import attach_adapter

bnb = pytest.importorskip("bitsandbytes")

TARGETS = ("q_proj", "down_proj")


def quantised(bits, kind=None, **settings):
    """A tiny model with modules of bitsandbytes, which are adapted."""
    model = tiny("llama", hidden_size=64, intermediate_size=128)
    for layer in model.model.layers:
        for parent, name in ((layer.self_attn, "q_proj"), (layer.mlp, "down_proj")):
            plain = getattr(parent, name)
            setattr(parent, name, (in_4_bits if bits == 4 else in_8_bits)(plain).to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    if kind is not None:
        return shake(attach_adapter(model, kind, rank=4))
    return shake(get_peft_model(model, LoraConfig(r=4, target_modules=list(TARGETS), **settings)))


def in_4_bits(plain):
    module = bnb.nn.Linear4bit(plain.in_features, plain.out_features, bias=False, compute_dtype=torch.float32)
    module.weight = bnb.nn.Params4bit(plain.weight.data.clone(), requires_grad=False, quant_type="nf4", module=module)
    return module


def in_8_bits(plain):
    module = bnb.nn.Linear8bitLt(plain.in_features, plain.out_features, bias=False, has_fp16_weights=False)
    module.weight = bnb.nn.Int8Params(plain.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    return module


PLAIN = [(4, {}), (4, {"use_dora": True}), (8, {})]
OTHERS = [(4, {"kind": "series"}), (8, {"kind": "parallel"}), (4, {"kind": "vera"}), (8, {"kind": "oft"})]


@pytest.mark.parametrize(("bits", "settings"), [*PLAIN, *OTHERS])
def test_gradients_are_those_of_the_chosen_rows(bits, settings):
    model = quantised(bits, **settings)
    inputs = batch(model, 4)
    single = sample_gradients(model, inputs)
    with GAST(2, "rest").attach(model) as sift:
        summed_loss(model, inputs).backward()
    for group, selected in zip(group_by_layer(model), sift.last.selected, strict=True):
        for parameter in group.parameters.values():
            wanted = single[parameter][selected].sum(0) * 2
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
