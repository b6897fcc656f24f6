"""Prefixes against transformers' own cache that holds them, and what they are saved as."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.adapted import base, shake
from support.tiny import FAMILIES, batch, tiny
from transformers import DynamicCache

from siftune.base.errors import AdapterError
from siftune.models.adapters.attach import attach_adapter, load_adapter
from siftune.models.adapters.registry import CARRIERS

COUNT = 3


def prefixed(family, **settings):
    return shake(attach_adapter(base(family), "prefix", rank=COUNT, **settings)).eval().double()


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def reference(family, model, ids, seen):
    """The base with a cache that is full of the prefix, whose tokens stand where they would without it."""
    cache, parameters = DynamicCache(), dict(model.named_parameters())
    for layer in range(4):
        [keys] = [p for n, p in parameters.items() if f".{layer}." in n and "prefix_keys" in n]
        [values] = [p for n, p in parameters.items() if f".{layer}." in n and "prefix_values" in n]
        cache.update(keys.detach().expand(len(ids), -1, -1, -1), values.detach().expand(len(ids), -1, -1, -1), layer)
    before = torch.ones(len(ids), COUNT, dtype=seen.dtype)
    places = (seen.cumsum(1) - 1).clamp_min(0)
    return logits(
        base(family).double(),
        input_ids=ids,
        attention_mask=torch.cat((before, seen), 1),
        position_ids=places,
        past_key_values=cache,
    )


@pytest.mark.matrix
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bloom"])  # which takes no positions
def test_it_is_a_cache_that_is_full_of_it(family):
    model = prefixed(family)
    inputs = batch(model, 3)
    ids, seen = inputs["input_ids"], inputs["attention_mask"]
    places = (seen.cumsum(1) - 1).clamp_min(0)
    found = logits(model, input_ids=ids, attention_mask=seen, position_ids=places)
    expected = reference(family, model, ids, seen)
    read = seen.bool()
    torch.testing.assert_close(found[read], expected[read], rtol=1e-9, atol=1e-9)
    plain = logits(base(family).double(), input_ids=ids, attention_mask=seen, position_ids=places)
    assert float((found - plain)[read].abs().max()) > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model, input_ids=ids, attention_mask=seen, position_ids=places), plain)


@pytest.mark.parametrize("family", ["bloom", "gemma2"])
def test_tokens_that_come_one_by_one_see_it_too(family):
    model = prefixed(family)
    ids = batch(model, 1)["input_ids"]
    whole, cache = logits(model, input_ids=ids), DynamicCache(config=model.config)
    steps = [logits(model, input_ids=ids[:, i : i + 1], past_key_values=cache) for i in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-9, atol=1e-9)
    assert cache.get_seq_length() == ids.shape[1]


def test_a_folder_is_pefts_and_loads_to_the_same_bits(tmp_path):
    model = prefixed("llama", layers=(0, -1)).float()
    model.save_pretrained(tmp_path)
    shapes = {name: tuple(value.shape) for name, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert set(shapes.values()) == {(2, COUNT, 8)}
    assert len(shapes) == 4
    inputs = batch(model, 2)
    for again in (load_adapter(tiny("llama"), tmp_path, "x"), PeftModel.from_pretrained(tiny("llama"), tmp_path)):
        assert torch.equal(logits(again.eval(), **inputs), logits(model, **inputs))
        assert torch.equal(logits(again.unload(), **inputs), logits(tiny("llama"), **inputs))
    with pytest.raises(ValueError, match="so that no weight does it"):
        model.merge_and_unload()


def test_two_prefixes_stand_one_after_the_other():
    model = attach_adapter(tiny("llama"), "prefix", rank=2)
    model.add_adapter("second", attach_adapter(tiny("llama"), "prefix", rank=1).peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    shake(model).eval()
    one = attach_adapter(tiny("llama"), "prefix", rank=3).eval()
    both = dict(model.named_parameters())
    for name, parameter in one.named_parameters():
        if "prefix_" in name:
            parameter.data = torch.cat((both[name], both[name.replace("default", "second")]), 1).detach()
    torch.testing.assert_close(logits(model, **batch(model)), logits(one, **batch(model)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("llama", {"targets": ["q_proj"]}, "targets names modules, but a prefix goes on attention"),
        ("llama", {"alpha": 3}, "alpha is 3, which an adapter prefix does not have"),
        ("mamba", {}, "the layers of MambaForCausalLM have no attention"),
        ("rwkv", {}, "RwkvSelfAttention keeps no keys and values of the past"),
    ],
)
def test_what_is_refused(family, settings, words):
    with pytest.raises(AdapterError, match=words):
        attach_adapter(tiny(family), "prefix", **settings)


def test_what_is_refused_when_it_runs():
    model = attach_adapter(tiny("llama"), "prefix")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(AdapterError, match="attention is flex_attention, which takes no mask"):
        model(**batch(model))
    wide = tiny("llama")
    wide.config.head_dim = 4
    with pytest.raises(AdapterError, match=r"keys of shape \(2, 2, 7, 8\) .* 2 heads of size 4"):
        attach_adapter(wide, "prefix")(**batch(wide, 2))
    assert CARRIERS["prefix"].rank == 30
