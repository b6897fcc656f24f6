"""Targets of adapters, and refused settings."""

import json
import logging

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from support.adapted import adapted, shake
from support.tiny import FAMILIES, logits, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from siftune.base.errors import AdapterError
from siftune.engine.groups import group_by_layer, outside
from siftune.models.adapters.attach import attach_adapter, load_adapter
from siftune.models.layers import find_layers

# --- attach


@pytest.mark.parametrize(
    ("family", "kind"), [*((family, "lora") for family in FAMILIES), ("gpt2", "dora"), ("llama", "rslora")]
)
def test_attach_covers_the_linears_of_every_layer(family, kind, recwarn, caplog):
    model = tiny(family)
    before = logits(model)
    found = find_layers(model)
    linears = [
        {name for name, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)} for layer in found.layers
    ]
    with caplog.at_level(logging.WARNING):
        peft = attach_adapter(model, kind, rank=2)
    for layer, expected in zip(found.layers, linears, strict=True):
        assert {name for name, m in layer.named_modules() if isinstance(m, BaseTunerLayer)} == expected
    assert not outside(peft, group_by_layer(peft))
    assert torch.allclose(logits(peft), before, atol=1e-5)
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
    assert not [record for record in caplog.records if "loss_type" not in record.message]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_attach_to_some_layers(family, tmp_path):
    model = tiny(family, layers=12)  # so that layer 1 is the beginning of 10 and 11
    found = find_layers(model)
    modules = dict(model.named_modules())
    linears = {name for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    inside = (f"{found.path}.1.", f"{found.path}.10.")
    peft = shake(attach_adapter(model, rank=2, layers=(-2, 1)))
    names = {name.removeprefix("base_model.model."): m for name, m in peft.named_modules()}
    assert {name for name, m in names.items() if isinstance(m, BaseTunerLayer)} == {
        name for name in linears if name.startswith(inside)
    }
    assert [group.index for group in group_by_layer(peft)] == [1, 10]
    peft.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(family, layers=12), tmp_path).eval()
    assert torch.equal(logits(again), logits(peft))


def test_attach_to_some_modules_of_some_layers():
    model = attach_adapter(tiny("llama"), rank=2, targets=["q_proj", "lm_head"], layers=(0, -4, 2))
    tuners = {name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert tuners == {f"base_model.model.model.layers.{n}.self_attn.q_proj" for n in (0, 2)}


def test_attach_leaves_experts_and_routers_alone():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.zeros(6, 8, 32))

    model = tiny("llama", layers=3)
    listed, fused, conv = (layer.mlp for layer in model.model.layers)
    listed.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32)) for _ in range(5))
    listed.router, listed.shared_gate = nn.Linear(32, 5), nn.Linear(32, 1)
    fused.experts = Experts()
    fused.gate = nn.Sequential(nn.Linear(32, 6))
    conv.conv = nn.Conv1d(32, 32, 3)
    model.requires_grad_(False)
    attach_adapter(model, rank=2)
    for mlp in (listed, fused, conv):
        adapters = {name for name, m in mlp.named_modules() if isinstance(m, BaseTunerLayer)}
        assert adapters == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("family", "wanted"),
    [
        ("glm4_moe", {"q_proj", "k_proj", "v_proj", "o_proj"}),  # PEFT takes gate_proj of its dense layer for experts
        ("deepseek_v3", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
        ("mamba", {"in_proj"}),
        ("zamba", {"in_proj"}),  # its mixers have weights of (heads, out, in), as experts have
        ("rwkv", {"key", "value", "receptance", "output"}),  # its blocks have weights of (1, 1, hidden)
    ],
)
def test_attach_keeps_to_what_an_adapter_works_on(family, wanted, tmp_path):
    attach_adapter(tiny(family), rank=2).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny(family), tmp_path)
    adapters = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert {name.rpartition(".")[2] for name in adapters} == wanted
    assert not [name for name, m in adapters.items() if isinstance(m, ParamWrapper)]
    assert len(group_by_layer(attach_adapter(tiny(family), rank=2))) == 4


def test_default_targets_are_short_but_stay_in_the_layers():
    plain = attach_adapter(tiny("llama"), rank=2).peft_config["default"]
    assert plain.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    model = tiny("llama")
    model.q_proj = nn.Linear(2, 2)  # a namesake outside of the layers
    attach_adapter(model, rank=2)
    assert not isinstance(model.q_proj, BaseTunerLayer)
    assert isinstance(model.model.layers[0].self_attn.q_proj, BaseTunerLayer)


@pytest.mark.parametrize(("others", "layers"), [([], None), (["q_proj"], (0, -1))])
def test_experts_of_a_mixture(others, layers, tmp_path):
    model = attach_adapter(tiny("mixtral"), rank=2, targets=["experts", *others], layers=layers)
    shake(model).eval().save_pretrained(tmp_path)
    banks = {name for name, m in model.named_modules() if isinstance(m, ParamWrapper)}
    numbers = range(4) if layers is None else (0, 3)
    assert {name.split(".layers.")[1].split(".")[0] for name in banks} == {str(number) for number in numbers}
    assert [group.index for group in group_by_layer(model)] == list(numbers)
    again = load_adapter(tiny("mixtral"), tmp_path, "mixtral").eval()
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(again), logits(tiny("mixtral")), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "settings", "scale"),
    [
        ("lora", {"rank": 4}, 2.0),
        ("lora", {"rank": 4, "alpha": 3}, 0.75),
        ("dora", {"rank": 8}, 2.0),
        ("rslora", {"rank": 4}, 8.0),
        ("rslora", {"rank": 16}, 4.0),
        ("rslora", {"rank": 4, "alpha": 2}, 1.0),
    ],
)
def test_scale_of_the_response(kind, settings, scale):
    attach = attach_adapter(tiny("llama"), kind, **settings)
    tuners = [m for m in attach.modules() if isinstance(m, BaseTunerLayer)]
    assert {m.scaling["default"] for m in tuners} == {scale}


def test_norms_do_not_train_in_half_precision():
    with pytest.raises(AdapterError, match=r"layernorm.*weight .*--dtype float32"):
        attach_adapter(tiny("llama").to(torch.bfloat16), "ln")


def test_settings_reach_peft_and_the_saved_adapter(tmp_path):
    model = attach_adapter(tiny("gpt2").to(torch.bfloat16), "dora", rank=3, dropout=0.25, targets=["attn.c_attn"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (3, 6, 0.25)
    assert (saved["use_dora"], saved["use_rslora"], saved["fan_in_fan_out"]) == (True, False, True)
    assert (saved["task_type"], saved["target_modules"]) == ("CAUSAL_LM", ["c_attn"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["q_proj", "c_attn"]}, r"c_attn; available: down_proj, gate_proj"),
        ({"targets": []}, r"targets is empty.*available: down_proj"),
        ({"targets": ["mlp"]}, r"called mlp; available"),
        ({"kind": "xlora"}, r"unknown adapter type 'xlora'"),
        (
            {"targets": ["experts"]},
            "names experts, but LlamaForCausalLM",
        ),
        ({"rank": 0}, r"rank must be ≥ 1.*rank=0"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\).*dropout=1.0"),
    ],
)
def test_attach_refuses(settings, message):
    with pytest.raises(AdapterError, match=message):
        attach_adapter(tiny("llama"), **settings)


def test_a_damaged_file_of_weights_is_refused(tmp_path):
    attach_adapter(tiny("llama")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    name, tensor = next(iter(load_file(path).items()))
    save_file({name: tensor.clone()}, path)
    with pytest.raises(AdapterError, match="missing adapter keys"):
        load_adapter(tiny("llama"), tmp_path, "base")
    data = path.read_bytes()
    path.unlink()  # it may still be mapped into memory
    path.write_bytes(data[:20])
    with pytest.raises(AdapterError, match="does not fit the model base"):
        load_adapter(tiny("llama"), tmp_path, "base")
    path.unlink()
    with pytest.raises(AdapterError, match="has no weights"):
        load_adapter(tiny("llama"), tmp_path, "base")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(AdapterError, match="does not fit the model base"):
        load_adapter(tiny("llama"), tmp_path, "base")


def test_tensors_that_are_none_of_the_adapter_are_refused(tmp_path):
    """PEFT ignores those of modules that the config does not name, and puts those of the base into it."""
    adapted().save_pretrained(tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    settings, tensors = json.loads(config.read_text()), load_file(weights)
    load_adapter(tiny("llama"), tmp_path, "base")
    config.write_text(json.dumps(settings | {"target_modules": ["q_proj"]}))
    with pytest.raises(AdapterError, match=r"\.lora_A\.weight, which is no part"):
        load_adapter(tiny("llama"), tmp_path, "base")
    config.write_text(json.dumps(settings))
    for name in ("mlp.down_proj.weight", "self_attn.q_proj.base_layer.weight"):
        place = f"model.layers.2.{name}"
        own = tiny("llama").get_parameter(place.replace(".base_layer", ""))
        save_file({**tensors, f"base_model.model.{place}": 2 * own}, weights)
        with pytest.raises(AdapterError, match=f"{place}, which is no part"):
            load_adapter(tiny("llama"), tmp_path, "base")


def test_saved_embeddings_are_for_measuring_and_not_for_training(tmp_path):
    """Training would not save them again."""
    adapted().save_pretrained(tmp_path, save_embedding_layers=True)
    load_adapter(tiny("llama"), tmp_path, "base")
    with pytest.raises(AdapterError, match=r"lm_head\.weight, which is no part"):
        load_adapter(tiny("llama"), tmp_path, "base", trainable=True)


def test_attach_refuses_a_second_time():
    with pytest.raises(AdapterError, match="has adapters already"):
        attach_adapter(adapted())
