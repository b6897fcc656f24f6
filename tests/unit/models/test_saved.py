"""Configs of adapters that another party may have made: checked before PEFT reads them."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from support.tiny import tiny

from siftune.base.errors import AdapterError, InputError
from siftune.models.adapters import saved
from siftune.models.adapters.attach import load_adapter
from siftune.models.adapters.saved import check_patterns, read_config

PLAIN = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 2, "target_modules": ["q_proj"]}
CATASTROPHIC = "(([a-z_.0-9]+)+)+!"
NAMES = [name for name, _ in tiny("llama").named_modules()]


def write(folder, content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / "adapter_config.json").write_bytes(text)
    return folder


def test_the_fields_of_the_file_are_returned(tmp_path):
    content = {**PLAIN, "lora_alpha": 16.0, "use_rslora": True, "unknown": [1]}
    assert read_config(write(tmp_path, content)) == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "object"),
        ({}, "(peft_type: "),
        (b"{", "Invalid JSON"),
        (b"\xff\xfe", "Invalid JSON"),
        (b'{"a":' + b"[" * 100_000, "recursion limit"),
        (json.dumps({**PLAIN, "x": "y" * 2**22}).encode(), "it has more than 4,194,304 bytes"),
        ({**PLAIN, "peft_type": "XLORA", "adapters": {"0": "/etc"}}, "XLORA is not supported; supported types: LORA"),
        ({**PLAIN, "peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING is not supported"),
        ({**PLAIN, "peft_type": [1]}, "(peft_type: "),
        ({**PLAIN, "base_model_name_or_path": 5}, "(base_model_name_or_path: "),
        ({**PLAIN, "r": -1}, "(r: "),
        ({**PLAIN, "r": 10**12}, "(r: "),
        ({**PLAIN, "r": "8"}, "(r: "),
        ({**PLAIN, "rank_pattern": {"q_proj": 10**12}}, "(rank_pattern.q_proj: "),
        ({**PLAIN, "rank_pattern": ["q_proj"]}, "(rank_pattern: "),
        ({**PLAIN, "lora_alpha": float("nan")}, "(lora_alpha: "),
        ({**PLAIN, "target_modules": {"q_proj": 1}}, "target_modules"),
        ({**PLAIN, "target_modules": [5]}, "target_modules"),
        ({**PLAIN, "modules_to_save": [5]}, "(modules_to_save.0: "),
        ({**PLAIN, "use_dora": "yes"}, "(use_dora: "),
        ({**PLAIN, "layer_replication": [[0, 1]] * 200_000}, "layers that share their weights are not supported"),
        ({**PLAIN, "init_lora_weights": "pissa_niter_999999"}, "at most 64 iterations"),
        ({**PLAIN, "init_lora_weights": "pissa_niter_" + "9" * 5000}, "at most 64 iterations"),
        ({**PLAIN, "init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 10**9}}, "loftq is not supported"),
    ],
)
def test_a_config_of_another_form_is_refused(tmp_path, content, message):
    with pytest.raises(AdapterError) as error:
        read_config(write(tmp_path, content))
    assert str(error.value).startswith(f"{tmp_path}/adapter_config.json cannot be read (")
    assert message in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q_proj|v_proj)"},
        {"target_modules": r"(?:.*?(?:model).*?(?:attn|mlp).*?(?:q_proj|k_proj))|(?:\bmodel\.layers\.[\d]{1,}\.x)"},
        {"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 3}, "alpha_pattern": {"^model.*q_proj": 1.5}},
        {"exclude_modules": r".*lm_head", "layers_to_transform": [0], "layers_pattern": "layers"},
        {"rank_pattern": {f"layers.{number}.q_proj": 2 for number in range(500)}},
        {"init_lora_weights": "pissa_niter_16"},
        {"layer_replication": None, "init_lora_weights": "gaussian"},
    ],
)
def test_usual_configs_pass(tmp_path, change):
    check_patterns(tmp_path, read_config(write(tmp_path, {**PLAIN, **change})), NAMES)


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": CATASTROPHIC},
        {"exclude_modules": CATASTROPHIC},
        {"rank_pattern": {CATASTROPHIC: 3}},
        {"alpha_pattern": {"q_proj": 1.0, CATASTROPHIC: 3.0}},
        {"layers_to_transform": [0], "layers_pattern": [CATASTROPHIC]},
        {"modules_to_save": [CATASTROPHIC]},
        {"peft_type": "IA3", "feedforward_modules": CATASTROPHIC},
    ],
    ids=["targets", "excluded", "ranks", "alphas", "layers", "saved", "ia3"],
)
def test_a_pattern_without_end_is_refused(tmp_path, monkeypatch, change):
    monkeypatch.setattr(saved, "_SECONDS", 1.0)
    config = read_config(write(tmp_path, {**PLAIN, **change}))
    with pytest.raises(AdapterError, match=r"adapter_config\.json .*more than 1 s"):
        check_patterns(tmp_path, config, NAMES)


@pytest.mark.parametrize("change", [{"target_modules": "(("}, {"rank_pattern": {"((": 3}}, {"modules_to_save": ["(("]}])
def test_an_invalid_pattern_is_refused(tmp_path, change):
    config = read_config(write(tmp_path, {**PLAIN, **change}))
    with pytest.raises(AdapterError, match=r"has the pattern '\(\(', which is invalid"):
        check_patterns(tmp_path, config, NAMES)


def test_an_adapter_is_checked_before_it_is_loaded(tmp_path, monkeypatch):
    model = tiny("llama")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    load_adapter(tiny("llama"), tmp_path, "base")
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    monkeypatch.setattr(saved, "_SECONDS", 1.0)
    monkeypatch.setattr("peft.PeftModel.from_pretrained", None)
    for change in ({"target_modules": CATASTROPHIC}, {"layer_replication": [[0, 1], [0, 1]]}, {"peft_type": "XLORA"}):
        write(tmp_path, content | change)
        with pytest.raises(AdapterError, match="adapter_config"):
            load_adapter(model, tmp_path, "base")
    write(tmp_path, content)
    (tmp_path / "secret").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="secret is a symbolic link"):
        load_adapter(model, tmp_path, "base")
