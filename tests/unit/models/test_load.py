"""Loading models from folders and names; every way to fail ends in one sentence."""

import json
import shutil

import pytest
import torch
from support.tiny import batch, tiny
from support.tokenizer import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from siftune.base.errors import ModelError
from siftune.models import load, source
from siftune.models.load import load_model, usable_dtype, use_attention
from siftune.models.source import resolve


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", layers=2, vocab_size=300).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Stand in for a machine without a network, so that no test waits for one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def folder_with(path, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)],
)
def test_a_folder_loads_in_the_wanted_dtype(saved, dtype, wanted, monkeypatch):
    monkeypatch.setattr(load, "_multiplies", lambda dtype: True)
    model, tokenizer = load_model(str(saved), dtype)
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert not model.training
    assert tokenizer.pad_token == "<|pad|>"


@pytest.mark.parametrize("usable", ["bfloat16", "float32"])
def test_rotary_frequencies_are_those_of_transformers(saved, usable, monkeypatch):
    """In half precision, they would be off by up to 0.4 %."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr(load, "_multiplies", lambda dtype: dtype == getattr(torch, usable))
    model = load_model(str(saved))[0]
    assert model.dtype == getattr(torch, usable)
    expected = AutoModelForCausalLM.from_pretrained(saved, dtype=model.dtype)
    for (name, found), wanted in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert found.dtype == wanted.dtype, name
        assert torch.equal(found, wanted), name
    assert {name: p.dtype for name, p in model.named_parameters()} == {
        name: p.dtype for name, p in expected.named_parameters()
    }


def test_a_conversion_leaves_tensors_of_a_third_dtype():
    model = tiny("llama", layers=1).bfloat16()
    norm = model.model.norm.float()
    assert load.in_dtype(model, torch.float16) is model
    assert norm.weight.dtype == torch.float32
    assert {p.dtype for p in model.model.layers.parameters()} == {torch.float16}


def test_auto_avoids_a_dtype_that_the_processor_cannot_multiply_in(saved, monkeypatch, caplog):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr(load, "_multiplies", lambda dtype: dtype == torch.float32)
    with caplog.at_level("INFO"):
        assert load_model(str(saved))[0].dtype == torch.float32
    assert "the model is used in float32" in caplog.text
    assert load_model(str(saved), "bfloat16")[0].dtype == torch.bfloat16  # asked for by name
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr(load, "_has_bfloat16", lambda: True)
    assert load_model(str(saved))[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("reported", "avx512", "instructions", "wanted"),
    [
        (False, False, False, torch.float32),
        (True, False, False, torch.bfloat16),  # other processors than x86
        (True, True, False, torch.float32),
        (True, True, True, torch.bfloat16),
    ],
)
def test_bfloat16_needs_instructions_of_the_processor(monkeypatch, reported, avx512, instructions, wanted):
    """With AVX-512 alone, torch reports bfloat16 and emulates it."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: reported)
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: avx512)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: instructions)
    assert load.usable_dtype(torch.bfloat16) == wanted
    assert load.usable_dtype(torch.float32) == torch.float32


@pytest.mark.parametrize(
    ("capable", "model_type", "wanted"),
    [(True, "llama", "bfloat16"), (False, "llama", "float16"), (False, "gemma3_text", "float32")],
)
def test_auto_avoids_a_dtype_that_the_accelerator_only_emulates(monkeypatch, capable, model_type, wanted):
    def supported(including_emulation=True):
        return capable or including_emulation  # torch says yes on T4 and V100

    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", supported)
    assert usable_dtype(torch.bfloat16, model_type) == getattr(torch, wanted)
    assert usable_dtype(torch.float32, model_type) == torch.float32


def test_a_missing_padding_token_becomes_the_end_token(saved, tmp_path):
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    tokenizer.pad_token = None
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    _, loaded = load_model(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id == 3
    assert len(loaded) == size

    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="neither a padding nor an end token"):
        load_model(str(tmp_path))


def test_progress_bars_are_off_only_while_loading(saved, capfd):
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    load_model(str(saved))
    assert logging.is_progress_bar_enabled() is before
    assert "Loading weights" not in capfd.readouterr().err


def test_code_of_a_repository_is_never_run(tmp_path):
    own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    folder = folder_with(tmp_path / "m", model_type="never_heard_of", auto_map=own)
    (tmp_path / "m" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="needs code of its own"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


# transformers ignores the last two since 5.25
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_experts_implementation"])
def test_a_kernel_that_a_config_names_is_not_fetched(saved, tmp_path, monkeypatch, key):
    def fail(*_, **__):
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fail)
    folder = shutil.copytree(saved, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: "org/kernel"}))
    model, _ = load_model(str(folder))
    assert model.config._attn_implementation == load_model(str(saved))[0].config._attn_implementation
    if "org/kernel" in vars(AutoConfig.from_pretrained(folder)).values():
        with pytest.raises((AssertionError, OSError, ValueError, ImportError)):  # what transformers would do
            AutoModelForCausalLM.from_pretrained(folder)
    else:
        assert key.startswith("_")


def test_no_kernels_of_the_hub_are_used(saved):
    """transformers 5.25 uses them by default, and would exchange forwards of norms when training begins and ends."""
    model, _ = load_model(str(saved))
    assert not getattr(model, "_use_kernels", False)
    norm = next(module for module in model.modules() if type(module).__name__.endswith("RMSNorm"))
    norm.forward = own = norm.forward
    model.train().eval()
    assert norm.forward is own


def test_an_unknown_hub_id_says_what_was_tried_and_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HOME", "/some/cache")
    with pytest.raises(ModelError) as caught:
        load_model("nobody/nothing")
    for part in ("'nobody/nothing'", "no such folder", "/some/cache", "`siftune pull smollm2`", "HF_HOME"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_a_misspelt_smollm2_gets_a_hint():
    with pytest.raises(ModelError, match=r"did you mean smollm2\?"):
        load_model("SmolLM-2")


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({"model_type": "never_heard_of"}, None, "does not recognize this architecture"),
        ({"model_type": "t5"}, None, "Unrecognized configuration class"),
        ({"model_type": "llama"}, None, r"no file named model\.safetensors"),
        ({"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 9}, b"xx", "header too small"),
    ],
)
def test_a_broken_folder_is_named_with_the_reason(tmp_path, config, weights, message):
    folder = folder_with(tmp_path / "m", **config)
    if weights:
        (tmp_path / "m" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match=f"from the folder {folder}: .*{message}"):
        load_model(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": None}, {"hidden_size": "x"}, {"hidden_size": -1}, {"num_hidden_layers": []}, {"vocab_size": 0},
        {"num_attention_heads": 0}, {"dtype": "x"}, {"dtype": -1}, {"quantization_config": []}, {"id2label": 5},
        {"rms_norm_eps": {}}, {"layer_types": "x"}, {"auto_map": 0}, {"model_type": []}, {"model_type": 5},
        {"rope_parameters": 1.5}, {"tie_word_embeddings": "x"}, {"pad_token_id": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_with_a_field_of_another_form_is_refused(saved, tmp_path, change):
    folder = shutil.copytree(saved, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=r"cannot load .* folder"):
        load_model(str(folder))


@pytest.mark.parametrize("content", ["5", "null", "[]", "[" * 100_000])
def test_a_config_that_is_no_object_is_refused(saved, tmp_path, content):
    folder = shutil.copytree(saved, tmp_path / "m")
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"cannot load .* folder"):
        load_model(str(folder))


def test_smollm2_is_pulled_on_first_use(saved, monkeypatch):
    monkeypatch.setattr(source, "pull_smollm2", lambda: saved)
    assert resolve("smollm2") == saved
    assert load_model("smollm2")[0].config.num_hidden_layers == 2


def test_attention_can_be_chosen_and_changes_rounding_only():
    model = tiny("llama").eval()
    inputs = {key: value for key, value in batch(model, 2).items() if key != "labels"}
    with torch.no_grad():
        before = model(**inputs).logits
        use_attention(model, "auto")
        assert model.config._attn_implementation == "sdpa"
        use_attention(model, "eager")
        after = model(**inputs).logits
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["flash_attention_2", "nothing"])
def test_attention_that_is_not_there_is_refused(name):
    model = tiny("llama")
    with pytest.raises(ModelError, match=f"attention {name} cannot be used: ") as caught:
        use_attention(model, name)
    assert "\n" not in str(caught.value)
    assert model.config._attn_implementation == "sdpa"
