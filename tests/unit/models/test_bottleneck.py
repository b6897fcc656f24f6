"""Series and parallel bottlenecks: against the formulas written with hooks on the base, from the saved file alone."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.adapted import base, shake
from support.tiny import FAMILIES, logits, tiny

from siftune.base.errors import AdapterError
from siftune.models.adapters.attach import attach_adapter, load_adapter
from siftune.models.layers import find_layers, find_sublayers

# by hand: attention, what it writes by, MLP, what it writes by
PLACES = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"),
        ("self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"),
    ),
    **dict.fromkeys(("mixtral", "qwen3_moe"), ("self_attn", "self_attn.o_proj", "mlp", "mlp")),
    "gpt2": ("attn", "attn.c_proj", "mlp", "mlp.c_proj"),
    "gpt_neox": ("attention", "attention.dense", "mlp", "mlp.dense_4h_to_h"),
    "opt": ("self_attn", "self_attn.out_proj", "fc1", "fc2"),
    "gptj": ("attn", "attn.out_proj", "mlp", "mlp.fc_out"),
    "bloom": ("self_attention", "self_attention.dense", "mlp", "mlp.dense_4h_to_h"),
}
WIDTH, ALPHA = 3, 5


def reference(family, kind, folder):
    """The formula in hooks on the base."""
    model, file = base(family).double(), load_file(folder / "adapter_model.safetensors")
    layers, given = find_layers(model), {}
    for number, layer in enumerate(layers.layers):
        attention, attention_writes, mlp, mlp_writes = PLACES[family]
        for reads, writes in ((attention, attention_writes), (mlp, mlp_writes)):
            key = f"base_model.model.{layers.path}.{number}.{writes}.bottleneck_"
            part = {name[len(key) :]: value.double() for name, value in file.items() if name.startswith(key)}

            def keep(_, args, kwargs, place=(number, writes)):
                given[place] = args[0] if args else kwargs["hidden_states"]

            def add(_, args, output, part=part, place=(number, writes)):
                x = output if kind == "series" else given[place]
                hidden = torch.relu(x @ part["down.weight"].T + part["down.bias"])
                return output + ALPHA / WIDTH * (hidden @ part["up.weight"].T + part["up.bias"])

            if part:
                layer.get_submodule(reads).register_forward_pre_hook(keep, with_kwargs=True)
                layer.get_submodule(writes).register_forward_hook(add)
    return logits(model)


@pytest.mark.parametrize(
    ("family", "kind", "targets"),
    [
        *((family, "parallel", ["attention", "mlp"]) for family in FAMILIES),
        *((family, "series", None) for family in ("llama", "gpt2", "opt", "mixtral")),
        ("gpt_neox", "parallel", None),
        ("bloom", "series", ["attention"]),
    ],
)
def test_it_is_the_formula(family, kind, targets, tmp_path):
    model = attach_adapter(base(family), kind, rank=WIDTH, alpha=ALPHA, targets=targets)
    assert torch.equal(logits(model), logits(base(family)))  # the start is the base, bit for bit
    shake(model).eval().double().save_pretrained(tmp_path)
    expected = reference(family, kind, tmp_path)
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
    assert float((expected - logits(base(family).double())).abs().max()) > 1e-2
    per_layer = len(targets) if targets else {"series": 2, "parallel": 1}[kind]
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 4 * 4 * per_layer  # layers, tensors of each


@pytest.mark.parametrize(("family", "kind"), [("llama", "series"), ("opt", "parallel"), ("mixtral", "parallel")])
def test_a_folder_is_pefts_and_loads_to_the_same_bits(family, kind, tmp_path):
    model = shake(attach_adapter(tiny(family), kind, rank=WIDTH, layers=(0, -1))).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["parallel"]) == ("BOTTLENECK", WIDTH, kind == "parallel")
    assert config["alpha"] == WIDTH * (4 if kind == "parallel" else 1)
    for again in (load_adapter(tiny(family), tmp_path, "x"), PeftModel.from_pretrained(tiny(family), tmp_path)):
        assert torch.equal(logits(again.eval()), logits(model))
        with again.disable_adapter():
            assert torch.equal(logits(again), logits(tiny(family)))
        assert torch.equal(logits(again.unload()), logits(tiny(family)))
        assert not any(module._forward_pre_hooks for module in again.modules())


def test_it_has_no_merged_form():
    model = attach_adapter(tiny("llama"), "series", rank=WIDTH)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="non-linearity"):
            merge()


def test_two_adapters_add_up():
    model = attach_adapter(tiny("llama"), "series", rank=WIDTH, targets=["mlp"])
    model.add_adapter("second", attach_adapter(tiny("llama"), "parallel", rank=2).peft_config["default"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "default" in n
    }
    model.base_model.set_adapter(["default", "second"])
    shake(model).eval()
    both = logits(model)
    model.base_model.set_adapter("second")
    alone = logits(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), alone)
    assert not torch.allclose(both, alone)


def test_a_sublayer_that_writes_twice_is_refused():
    model = attach_adapter(tiny("llama"), "parallel", rank=WIDTH)
    mlp = model.base_model.model.model.layers[0].mlp
    mlp.forward = lambda x, once=mlp.forward: once(x) + once(x)
    with pytest.raises(AdapterError, match="a parallel bottleneck has no input there"):
        logits(model)


def test_dropout_is_on_the_input_and_off_in_eval():
    model = shake(attach_adapter(tiny("llama"), "parallel", rank=WIDTH, dropout=0.5))
    assert torch.equal(logits(model.eval()), logits(model))
    assert not torch.equal(logits(model.train()), logits(model))


def test_half_precision_bases_keep_float32_adapters(tmp_path):
    for family in ("llama", "mixtral"):
        model = attach_adapter(tiny(family).bfloat16(), "parallel", rank=WIDTH)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert logits(model).dtype == torch.bfloat16
        model.save_pretrained(tmp_path)
        again = load_adapter(tiny(family).bfloat16(), tmp_path, "x")
        assert {p.dtype for n, p in again.named_parameters() if "bottleneck" in n} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_sublayers_are_where_they_are_by_hand(family):
    model = tiny(family)
    path = find_layers(model).path
    attention, attention_writes, mlp, mlp_writes = PLACES[family]
    assert [(place.part, place.reads, place.writes) for place in find_sublayers(model)] == [
        entry
        for number in range(4)
        for entry in (
            ("attention", f"{path}.{number}.{attention}", f"{path}.{number}.{attention_writes}"),
            ("mlp", f"{path}.{number}.{mlp}", f"{path}.{number}.{mlp_writes}"),
        )
    ]


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("llama", {"targets": ["q_proj"]}, "targets names q_proj"),
        ("llama", {"rank": 0}, "rank must be ≥ 1"),
        ("mamba", {"targets": ["mlp"]}, "MambaForCausalLM have no mlp"),
    ],
)
def test_unusable_settings_are_refused(family, settings, words):
    with pytest.raises(AdapterError, match=words):
        attach_adapter(tiny(family), "series", **settings)


def test_a_mixer_of_mamba_writes_through_its_own_output():
    """Fused kernels read the weight of its output projection past any adapter."""
    places = find_sublayers(tiny("mamba"))
    assert [(place.part, place.reads == place.writes) for place in places] == [("attention", True)] * 4
