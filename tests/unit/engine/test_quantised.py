"""Bases quantised by bitsandbytes, if it is installed; methods on them: tests/invariants/test_adapter_types.py."""

import pytest
import torch
from support.adapted import shake
from support.rounded import SIZES, rounded
from support.tiny import batch, tiny

from siftune import GAST
from siftune.base.errors import AdapterError
from siftune.engine.groups import group_by_layer
from siftune.engine.substitution import use_base_dtype
from siftune.models.adapters.attach import attach_adapter
from siftune.models.adapters.registry import ADAPTER_TYPES

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", ["lora", "dora", "series"])
def test_on_rounded_weights_it_is_the_adapter_on_what_they_stand_for(kind):
    rank = {"rank": 4} if "rank" in ADAPTER_TYPES[kind].keys else {}
    model, plain = rounded(4), tiny("llama", **SIZES)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            weight = model.get_submodule(name).weight
            module.weight.data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    with torch.random.fork_rng(devices=[]):
        found, wanted = (shake(attach_adapter(one, kind, **rank)).train() for one in (model, plain))
    inputs = batch(model, 3)
    torch.testing.assert_close(found(**inputs).logits, wanted(**inputs).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("kind", "bits"), [("lora", 4), ("dora", 4), ("ia3", 4), ("parallel", 8), ("dora", 8)])
def test_in_half_precision_a_kind_trains_or_is_refused(kind, bits):
    model = rounded(bits)
    for part in (model.model.embed_tokens, model.model.norm, model.lm_head, model.model.rotary_emb):
        part.bfloat16()
    for layer in model.model.layers:
        layer.input_layernorm.bfloat16()
        layer.post_attention_layernorm.bfloat16()
    refused = {4: {"ia3"}, 8: {"dora", "ia3"}}[bits]
    if kind in refused:
        with pytest.raises(AdapterError, match=kind):
            attach_adapter(model, kind)
        return
    rank = {"rank": 4} if "rank" in ADAPTER_TYPES[kind].keys else {}
    tuned = shake(attach_adapter(model, kind, **rank)).train()
    groups = group_by_layer(tuned)
    with use_base_dtype(tuned, groups), GAST(2, "rest").attach(tuned):
        tuned(**batch(tuned, 3)).loss.backward()
    for group in groups:
        for parameter in group.parameters.values():
            assert bool(torch.isfinite(parameter.grad).all())
            assert float(parameter.grad.abs().max()) > 0
