"""Configs of saved adapters: checked before PEFT reads them."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from support.tiny import tiny

from siftune.base.errors import AdapterError
from siftune.models.adapters.attach import load_adapter
from siftune.models.adapters.saved import read_config

PLAIN = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 2, "target_modules": ["q_proj"]}


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
        ({**PLAIN, "layer_replication": [[0, 1]]}, "layers that share their weights are not supported"),
    ],
)
def test_a_config_of_another_form_is_refused(tmp_path, content, message):
    with pytest.raises(AdapterError) as error:
        read_config(write(tmp_path, content))
    assert str(error.value).startswith(f"{tmp_path}/adapter_config.json cannot be read (")
    assert message in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("change", [{"target_modules": "(("}, {"rank_pattern": {"((": 3}}])
def test_an_invalid_pattern_is_refused(tmp_path, change):
    get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(AdapterError, match=str(tmp_path)):
        load_adapter(tiny("llama"), write(tmp_path, content | change), "base")


def test_an_adapter_is_checked_before_it_is_loaded(tmp_path, monkeypatch):
    model = tiny("llama")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    load_adapter(tiny("llama"), tmp_path, "base")
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    monkeypatch.setattr("peft.PeftModel.from_pretrained", None)
    for change in ({"layer_replication": [[0, 1], [0, 1]]}, {"peft_type": "XLORA"}):
        write(tmp_path, content | change)
        with pytest.raises(AdapterError, match="adapter_config"):
            load_adapter(model, tmp_path, "base")
