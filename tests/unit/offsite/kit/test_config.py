"""A kit's config, and the trial of its model."""

import dataclasses

import pytest
import torch
from support.kits import KINDS, contents
from support.tiny import tiny
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from siftune.base.errors import KitError
from siftune.models.families import FAMILIES
from siftune.offsite.emulator.model import LayerShape, build
from siftune.offsite.kit import config
from siftune.offsite.kit import config as trial
from siftune.offsite.kit.config import (
    MAX_BUFFERS,
    check_of_base,
    check_settings,
    expected_specs,
    make_config,
    scrub,
    try_model,
)
from siftune.offsite.kit.manifest import FileSpec, Manifest
from siftune.offsite.kit.tensors import TensorSpec, spec_of

TESTED = [kind for kind in FAMILIES if kind != "gemma"]  # which is tested as gemma2 is


def manifest_of(parts):
    outer = {name: spec_of(tensor) for name, tensor in parts.outer.items()}
    files = {"config.json": FileSpec(1, "0" * 64)}
    kind = parts.config.model_type
    facts = parts.fingerprint, parts.calibration, parts.split, tuple(parts.middle)
    return Manifest(kind, parts.depth, *facts, outer, files)


@pytest.mark.parametrize("kind", TESTED)
def test_the_model_that_is_rebuilt_is_the_emulator(kind):
    parts = contents(kind)
    settings = check_settings(scrub(parts.config, "F32"))
    frozen, outer = expected_specs(settings, manifest_of(parts), ("F32", "F32"))
    assert frozen == {name: spec_of(tensor) for name, tensor in parts.frozen.items()}
    assert outer == {name: spec_of(tensor) for name, tensor in parts.outer.items()}
    before, after = parts.config.to_dict(), make_config(settings).to_dict()
    for name in config._known(kind) - {"dtype"}:
        assert after[name] == before[name], name


def test_only_settings_of_the_architecture_leave():
    named = AutoConfig.for_model(
        "llama",
        name_or_path="/home/canary",
        note="canary",
        id2label={0: "canary"},
        architectures=["Canary"],
        quantization_config={"canary": 1},
        auto_map={"AutoConfig": "canary.py"},
        attn_implementation="sdpa",
        rope_parameters={"rope_type": "default", "rope_theta": 5e5, "note": "canary"},
    )
    settings = scrub(named, "BF16")
    assert "anary" not in str(settings)
    assert set(settings) == config._known("llama")
    assert settings["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert settings["dtype"] == "bfloat16"
    assert not {"transformers_version", "architectures", "_name_or_path", "id2label"} & set(settings)


def test_both_sets_of_rotary_settings_leave():
    settings = scrub(tiny("gemma3").config, "F32")
    assert set(settings["rope_parameters"]) == {"sliding_attention", "full_attention"}
    assert settings["rope_parameters"]["full_attention"]["rope_theta"] == 1e6


def test_a_text_with_a_path_does_not_leave():
    config = tiny("llama").config
    config.hidden_act = "/home/canary"
    with pytest.raises(KitError, match=r"config\.json: hidden_act is '/home/canary'"):
        scrub(config, "F32")


@pytest.fixture
def settings():
    return scrub(contents().config, "F32")


YARN = {"factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
DEFECTS = [
    ({"model_type": "bert"}, "model_type is 'bert'; known are llama"),
    ({"model_type": ["llama"]}, "model_type is"),
    ({"auto_map": {"AutoConfig": "code.py--x"}}, "has the key 'auto_map'"),
    ({"attn_implementation": "someone/kernel"}, "has the key 'attn_implementation'"),
    ({"_attn_implementation": "someone/kernel"}, "has the key '_attn_implementation'"),
    ({"quantization_config": {}}, "has the key 'quantization_config'"),
    ({"per_layer_config": {}}, "has the key 'per_layer_config'"),
    ({"_name_or_path": "x"}, "has the key '_name_or_path'"),
    ({"num_labels": 10**9}, "has the key 'num_labels'"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"num_hidden_layers": 513}, "num_hidden_layers is 513, not a whole number from 2 to 512"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
    ({"hidden_size": -(10**9)}, "hidden_size is -1000000000"),
    ({"rms_norm_eps": 1e16}, "rms_norm_eps is 1e"),
    ({"hidden_act": "a/b"}, "hidden_act is 'a/b'"),
    ({"hidden_act": "x" * 65}, "hidden_act is 'x"),
    ({"hidden_act": {"x": 1}}, "hidden_act is {'x': 1}"),
    ({"eos_token_id": [[1]]}, r"eos_token_id is \[1\], not a whole number"),
    ({"eos_token_id": [1] * 1025}, "eos_token_id has 1025 items"),
    ({"eos_token_id": [10**9]}, "eos_token_id is 1000000000"),
    ({"rope_parameters": []}, r"rope_parameters is \[\], not an object"),
    ({"rope_parameters": {"code": 1}}, "rope_parameters has the unknown key 'code'"),
    ({"rope_parameters": {"rope_theta": 10**16}}, "rope_parameters.rope_theta is 1e"),
    ({"rope_parameters": {"short_factor": [1.0] * 1025}}, "rope_parameters.short_factor has 1025 items"),
    ({"rope_parameters": {"full_attention": 1}}, "rope_parameters.full_attention is 1, not an object"),
    ({"rope_parameters": {"full_attention": {"x": 1}}}, "rope_parameters.full_attention has the unknown key 'x'"),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "a b"}}},
        "rope_parameters.full_attention.rope_type is 'a b'",
    ),
]


@pytest.mark.parametrize(("change", "words"), DEFECTS, ids=[words[:40] for _, words in DEFECTS])
def test_settings_are_checked_before_any_config_is_built(settings, monkeypatch, change, words):
    monkeypatch.setattr(config, "make_config", lambda *_: pytest.fail("built"))
    monkeypatch.setattr(AutoConfig, "for_model", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(KitError, match=words) as caught:
        check_settings(settings | change)
    assert str(caught.value).startswith("config.json")


@pytest.mark.parametrize("value", [None, [], "llama", {}, {"model_type": "gpt2"}])
def test_not_settings_at_all(value):
    with pytest.raises(KitError, match=r"config\.json"):
        check_settings(value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 6}, "num_hidden_layers is 6, but 5 by split and middle of the manifest"),
        ({"model_type": "gpt2"}, "has the key '.*', which this version of transformers does not know"),
        ({"dtype": "float16"}, "dtype is 'float16', but float32 by emulator.safetensors"),
        ({"hidden_size": 33}, "no config of type llama"),
        ({"pad_token_id": 320}, "pad_token_id is 320, but the last of 320 tokens is one less"),
        ({"eos_token_id": [1, 320]}, "eos_token_id is 320, but the last of 320 tokens is one less"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide 4 attention heads"),
        ({"head_dim": 7}, "no config of type llama"),
        ({"head_dim": 3}, "the model of it cannot run"),
        ({"hidden_act": "nonsense"}, "no model can be built of it"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "config.json"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, "config.json"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_parameters make cosines"),
        ({"rope_parameters": {**YARN, "rope_type": "yarn", "attention_factor": 1e9}}, "rope_parameters make cosines"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}}, "cannot run"),
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, "config.json"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "config.json"),
    ],
)
def test_what_cannot_be_built_is_refused_in_words(settings, change, words):
    value = settings | change
    manifest = manifest_of(contents())
    with pytest.raises(KitError, match=words) as caught:
        expected_specs(check_settings(value), manifest, ("F32", "F32"))
    assert str(caught.value).startswith("config.json")


def test_the_family_must_be_that_of_the_manifest():
    settings = scrub(contents("qwen2").config, "F32")
    with pytest.raises(KitError, match=r"config\.json: model_type is 'qwen2', but llama by the manifest"):
        expected_specs(settings, manifest_of(contents()), ("F32", "F32"))


def test_large_models_are_described_without_memory(settings):
    value = settings | {"hidden_size": 10**8, "intermediate_size": 10**8, "vocab_size": 10**8}
    manifest = manifest_of(contents())
    frozen, outer = expected_specs(value, manifest, ("F32", "F32"))
    assert frozen["model.embed_tokens.weight"] == TensorSpec((10**8, 10**8), "F32")
    assert outer["first.0.mlp.up_proj.weight"] == TensorSpec((10**8, 10**8), "F32")


def test_buffers_that_no_file_pays_for_are_limited(settings):
    value = settings | {"head_dim": 2 * MAX_BUFFERS // 4}
    with pytest.raises(KitError, match=f"the model would compute {2 * MAX_BUFFERS} bytes of buffers"):
        expected_specs(value, manifest_of(contents()), ("F32", "F32"))


def test_the_middle_decides_the_shapes():
    parts = contents()
    manifest = manifest_of(parts)
    settings = scrub(parts.config, "BF16") | {"num_hidden_layers": 3}
    plain = dataclasses.replace(manifest, middle=(LayerShape(2),))
    frozen, _ = expected_specs(settings, plain, ("BF16", "F32"))
    assert frozen["model.layers.1.mlp.up_proj.weight"] == TensorSpec((48, 32), "BF16")
    assert not any(name.startswith(("model.layers.0.", "model.layers.2.")) for name in frozen)
    assert torch.float32 == parts.frozen["lm_head.weight"].dtype
    assert set(KINDS) <= set(FAMILIES)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2"])
def test_what_a_kit_says_of_its_base_is_held_to_it(kind):
    parts = contents(kind)
    settings, manifest, base = scrub(parts.config, "F32"), manifest_of(parts), tiny(kind, 5, vocab_size=320).config
    check_of_base(settings, manifest, base)
    with pytest.raises(KitError, match=r"manifest\.json: base\.layers is 5, but the base model's is 6"):
        check_of_base(settings, manifest, tiny(kind, 6, vocab_size=320).config)
    with pytest.raises(KitError, match=rf"base\.model_type is {kind}, but the base model's is gpt2"):
        check_of_base(settings, manifest, tiny("gpt2", 5, vocab_size=320).config)


def test_layers_of_another_kind_than_the_base_has_are_noticed():
    parts, base = contents("gemma2"), tiny("gemma2", 5, vocab_size=320).config
    middle = [dataclasses.replace(shape, base=min(shape.base + 1, 3)) for shape in parts.middle[1:]]
    shifted = dataclasses.replace(manifest_of(parts), middle=(parts.middle[0], *middle))
    with pytest.raises(KitError, match="layer_types are not those of the base's layers"):
        check_of_base(scrub(parts.config, "F32"), shifted, base)


ROTARY = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": YARN,
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32},
    "llama3": {**YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def model(family="llama", **overrides):
    parts = contents(family, **overrides)
    return build(parts.config, parts.split, parts.middle)


@pytest.mark.parametrize("kind", ROTARY)
def test_every_kind_of_rotary_embedding_runs(kind):
    try_model(model(rope_parameters={"rope_theta": 1e4, "rope_type": kind, **ROTARY[kind]}), "f")


def test_two_sets_of_rotary_settings_run():
    try_model(model("gemma3_text"), "f")


def test_numbers_that_do_not_fit_the_long_rows_are_refused():
    """Only rows past `original_max_position_embeddings` use them: nothing would show in a short trial."""
    settings = {**ROTARY["longrope"], "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0] * 3}
    with pytest.raises(KitError, match=r"f: the model of it cannot run \("):
        try_model(model(rope_parameters=settings), "f")


def test_a_position_past_the_last_is_tried(monkeypatch):
    """Only there `dynamic` takes other numbers."""
    seen, compute = [], ROPE_INIT_FUNCTIONS["dynamic"]

    def watched(config, device=None, seq_len=None, **options):
        seen.append(None if seq_len is None else int(seq_len))
        return compute(config, device, seq_len, **options)

    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "dynamic", watched)
    try_model(model(rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}), "f")
    assert seen[-1] == 65  # of 64


def test_angles_must_be_finite():
    built = model()
    built.config.rope_parameters["rope_theta"] = float("nan")
    with pytest.raises(KitError, match="f: rope_parameters make cosines that are not finite"):
        try_model(built, "f")


def test_neither_memory_nor_random_numbers_are_used(monkeypatch):
    built = model(attention_dropout=0.5)
    before = torch.get_rng_state()
    made = []
    monkeypatch.setattr(trial, "_angles", lambda module: made.append(module) or [])
    try_model(built, "f")
    assert made
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.device.type for p in built.parameters()} == {"meta"}
