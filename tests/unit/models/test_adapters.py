"""Adapters: where they go, how their parameters group by layer, how their response is damped."""

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from support.adapted import ADAPTED, adapted, shake, two_active_adapters
from support.tiny import FAMILIES, batch, tiny
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from siftune.engine.groups import group_by_layer, outside
from siftune.errors import AdapterError, LayerError, UnsupportedError
from siftune.models.adapters import KINDS, attach_adapter, suppress
from siftune.models.layers import find_layers


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch(model)).logits


# --- attach


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers": (4,)}, LayerError, "the model has 4 layers, so `layers` takes numbers from 0 to 3"),
        ({"layers": ()}, LayerError, "found none"),
        ({"layers": (0, 1), "targets": ["lm_head"]}, AdapterError, "none of the modules .* is in the layers 0, 1"),
    ],
)
def test_attach_refuses_layers(settings, error, message):
    with pytest.raises(error, match=message):
        attach_adapter(tiny("llama"), rank=2, **settings)


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
        ({"targets": ["q_proj", "c_attn"]}, r"called c_attn; available: down_proj, gate_proj, k_proj, lm_head, o_"),
        ({"targets": []}, r"targets is empty.*available: down_proj"),
        ({"targets": ["mlp"]}, r"called mlp; available"),
        ({"kind": "vera"}, r"unknown kind of adapter 'vera'; known: lora, rslora, dora"),
        ({"rank": 0}, r"rank must be ≥ 1.*rank=0"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\).*dropout=1.0"),
    ],
)
def test_attach_refuses(settings, message):
    with pytest.raises(AdapterError, match=message):
        attach_adapter(tiny("llama"), **settings)


def test_attach_refuses_a_second_time():
    with pytest.raises(AdapterError, match="has adapters already"):
        attach_adapter(adapted())


# --- group by layer


@pytest.mark.parametrize("name", ADAPTED)
def test_groups_and_outside_are_all_that_trains(name):
    model = ADAPTED[name]()
    groups = group_by_layer(model)
    assert [group.index for group in groups] == [0, 1, 2, 3]
    named = {f"{g.name}.{n}": p for g in groups for n, p in g.parameters.items()}
    named |= outside(model, groups)
    assert named == {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(model.get_submodule(group.name) is group.module for group in groups)


def test_groups_leave_out_layers_and_parameters_that_do_not_train():
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["model.norm"])
    model = get_peft_model(tiny("llama"), config)
    for name, parameter in model.named_parameters():
        if ".layers.1." in name or "lora_A" in name:
            parameter.requires_grad_(False)
    groups = group_by_layer(model)
    assert [group.index for group in groups] == [0, 2, 3]
    assert [list(g.parameters) for g in groups] == [["self_attn.q_proj.lora_B.default.weight"]] * 3
    assert {n.split(".")[-3] for n in outside(model, groups)} == {"lora_B", "modules_to_save"}


def test_groups_of_a_model_without_adapters():
    model = tiny("gpt2")
    groups = group_by_layer(model)
    assert sum(len(g.parameters) for g in groups) == len(list(model.transformer.h.parameters()))
    assert set(outside(model, groups)) == {n for n, _ in model.named_parameters() if ".h." not in n}


def test_nothing_trains_in_any_layer():
    model = tiny("llama")
    model.model.layers.requires_grad_(False)
    with pytest.raises(AdapterError, match=r"none of the 4 layers at model\.layers.*attach"):
        group_by_layer(model)


def test_sharing_between_layers_is_refused():
    model = adapted()
    first, second = (layer.self_attn.q_proj for layer in find_layers(model).layers[1:3])
    second.lora_A["default"].weight = first.lora_A["default"].weight
    with pytest.raises(UnsupportedError, match=r"layers\.1\.self_attn\.q_proj\.lora_A.* is .*layers\.2\.self_attn\.q"):
        group_by_layer(model)


def test_prompt_tuners_are_refused():
    model = get_peft_model(tiny("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert len(find_layers(model).layers) == 4
    with pytest.raises(UnsupportedError, match=r"PREFIX_TUNING.*use LoRA"):
        group_by_layer(model)


# --- damp the response


@contextmanager
def oracle(groups, indices, factor: float) -> Iterator[None]:
    """Damp by replacing forward methods: each adapted module adds factor·(own output − copied base's output)."""
    wrapped = []
    for index in indices:
        for module in groups[index].module.modules():
            if isinstance(module, BaseTunerLayer):
                base = copy.deepcopy(module.get_base_layer())

                def forward(*args, original=module.forward, base=base, **kwargs):
                    plain = base(*args, **kwargs)
                    return plain + factor * (original(*args, **kwargs) - plain)

                module.forward = forward
                wrapped.append(module)
    yield
    for module in wrapped:
        del module.forward


def snapshot(model: nn.Module) -> dict:
    """Everything that damping may touch."""
    modules = dict(model.named_modules())
    return {
        "scaling": {n: dict(m.scaling) for n, m in modules.items() if isinstance(getattr(m, "scaling", 0), dict)},
        "hooks": {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in modules.items()},
        "parameters": {n: id(p) for n, p in model.named_parameters()},
    }


@pytest.mark.parametrize("name", ADAPTED)
@settings(max_examples=15)
@given(indices=st.sets(st.integers(0, 3)), factor=st.sampled_from([0.0, 0.25, 0.7, 1.0, 2.0]))
def test_suppress_equals_the_oracle(models, name, indices, factor):
    model = models(name)
    groups = group_by_layer(model)
    before, state = logits(model), snapshot(model)
    with suppress(groups, indices, factor):
        damped = logits(model)
    with oracle(groups, indices, factor):
        expected = logits(model)
    assert torch.allclose(damped, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(damped, before) == (not indices or factor == 1)
    assert snapshot(model) == state
    assert torch.equal(logits(model), before)


@pytest.fixture(scope="module")
def models():
    """Build each adapted model once, in float64."""
    built = {}

    def get(name: str) -> nn.Module:
        if name not in built:
            built[name] = ADAPTED[name]().double()
        return built[name]

    return get


@pytest.mark.parametrize("name", ADAPTED)
def test_factor_zero_everywhere_is_the_base_model(models, name):
    model = models(name)
    with suppress(group_by_layer(model), range(4), 0.0):
        damped = logits(model)
    with model.disable_adapter():
        assert torch.allclose(damped, logits(model), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["lora patterns", "dora", "lora and dora"])
def test_suppress_restores_after_an_error(models, name):
    model = models(name)
    state = snapshot(model)
    groups = group_by_layer(model)
    damping = suppress(groups, [0, 2], 0.1)
    damping.__enter__()
    assert snapshot(model) != state
    error = RuntimeError("stop")
    assert not damping.__exit__(type(error), error, None)
    assert snapshot(model) == state


def test_suppress_restores_scales_that_products_would_not():
    model = adapted()
    module = find_layers(model).layers[0].mlp.up_proj
    module.scaling["default"] = 0.1 + 0.2
    with suppress(group_by_layer(model), [0, 0], 0.3):  # twice the same layer is once
        assert module.scaling["default"] == (0.1 + 0.2) * 0.3
    assert module.scaling["default"] == 0.1 + 0.2


def test_suppress_leaves_inactive_adapters_and_other_layers_alone():
    model = two_active_adapters()
    model.base_model.set_adapter("second")
    groups = group_by_layer(model)
    first, other = (groups[i].module.self_attn.q_proj for i in (0, 1))
    with suppress(groups, [0], 0.5):
        assert first.scaling == {"default": 1.0, "second": 2.25}
        assert other.scaling == {"default": 1.0, "second": 4.5}


def test_suppress_positions_count_groups():
    model = adapted()
    for parameter in find_layers(model).layers[0].parameters():
        parameter.requires_grad_(False)
    groups = group_by_layer(model)
    assert groups[0].index == 1
    with suppress(groups, [0], 0.5):
        assert groups[0].module.mlp.up_proj.scaling["default"] == 1.0


def test_suppress_needs_peft_adapters():
    groups = group_by_layer(tiny("llama"))
    with pytest.raises(AdapterError, match=r"model\.layers\.2 has no PEFT adapter.*RST"), suppress(groups, [2], 0.5):
        pass


def test_suppress_refuses_merged_adapters():
    model = adapted(targets=["q_proj", "v_proj"])
    groups = group_by_layer(model)
    model.merge_adapter()
    state = snapshot(model)
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn.q_proj: adapter default is merged.*unmerge"):
        suppress(groups, [1], 0.5).__enter__()
    assert snapshot(model) == state


def test_gradients_flow_through_a_damped_dora():
    model = adapted(kind="dora")
    groups = group_by_layer(model)
    with suppress(groups, [1], 0.25):
        model(**batch(model)).loss.backward()
    damped = [p.grad.clone() for p in groups[1].parameters.values()]
    model.zero_grad()
    with oracle(groups, [1], 0.25):
        model(**batch(model)).loss.backward()
    for grad, parameter in zip(damped, groups[1].parameters.values(), strict=True):
        assert torch.allclose(grad, parameter.grad, atol=1e-6)


def test_attaching_warns_of_nothing_of_ours():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach_adapter(tiny("gpt2"), "dora", rank=2)
    assert not [w for w in caught if w.category is not FutureWarning], [str(w.message) for w in caught]
