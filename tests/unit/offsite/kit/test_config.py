"""A kit's config, and the tensors of its model."""

import dataclasses

import pytest
import torch
from support.kits import KINDS, contents
from support.tiny import tiny
from transformers import CONFIG_MAPPING, AutoConfig

from siftune.base.errors import KitError
from siftune.models.families import FAMILIES
from siftune.offsite.emulator.model import LayerShape
from siftune.offsite.kit import config
from siftune.offsite.kit.config import (
    MAX_BUFFERS,
    check_of_base,
    check_settings,
    expected_specs,
    make_config,
    scrub,
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
    frozen, outer = expected_specs(settings, manifest_of(parts))
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
    ({"dtype": "float64"}, "dtype is 'float64'; known are float32"),
    ({"dtype": None}, "dtype is None; known are float32"),
    ({"dtype": ["float32"]}, "dtype is .*; known are float32"),
    ({"hidden_act": "a/b"}, "hidden_act is 'a/b'"),
    ({"hidden_act": "x" * 65}, "hidden_act is 'x"),
    ({"eos_token_id": ["../x"]}, "eos_token_id is '../x'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "a b"}}}, "rope_parameters is 'a b'"),
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
        ({"hidden_size": 33}, "no config of type llama"),
        ({"hidden_size": 10**30}, "config.json"),
        ({"pad_token_id": 320}, "no model can be built of it"),
        ({"hidden_act": "nonsense"}, "no model can be built of it"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "config.json"),
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, "config.json"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "config.json"),
    ],
)
def test_what_cannot_be_built_is_refused_in_words(settings, change, words):
    value = settings | change
    manifest = manifest_of(contents())
    with pytest.raises(KitError, match=words) as caught:
        expected_specs(check_settings(value), manifest)
    assert str(caught.value).startswith("config.json")


def test_the_family_must_be_that_of_the_manifest():
    settings = scrub(contents("qwen2").config, "F32")
    with pytest.raises(KitError, match=r"config\.json: model_type is 'qwen2'"):
        expected_specs(settings, manifest_of(contents()))


def test_large_models_are_described_without_memory(settings):
    value = settings | {"hidden_size": 10**8, "intermediate_size": 10**8, "vocab_size": 10**8}
    manifest = manifest_of(contents())
    frozen, outer = expected_specs(value, manifest)
    assert frozen["model.embed_tokens.weight"] == TensorSpec((10**8, 10**8), "F32")
    assert outer["first.0.mlp.up_proj.weight"] == TensorSpec((10**8, 10**8), "F32")


def test_buffers_that_no_file_pays_for_are_limited(settings):
    value = settings | {"head_dim": 2 * MAX_BUFFERS // 4}
    with pytest.raises(KitError, match=f"the model would compute {2 * MAX_BUFFERS} bytes of buffers"):
        expected_specs(value, manifest_of(contents()))


def test_the_middle_decides_the_shapes():
    parts = contents()
    manifest = manifest_of(parts)
    settings = scrub(parts.config, "BF16") | {"num_hidden_layers": 3}
    plain = dataclasses.replace(manifest, middle=(LayerShape(2),))
    frozen, _ = expected_specs(settings, plain)
    assert frozen["model.layers.1.mlp.up_proj.weight"] == TensorSpec((48, 32), "BF16")
    assert not any(name.startswith(("model.layers.0.", "model.layers.2.")) for name in frozen)
    assert torch.float32 == parts.frozen["lm_head.weight"].dtype
    assert set(KINDS) <= set(FAMILIES)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2"])
def test_what_a_kit_says_of_its_base_is_held_to_it(kind):
    parts = contents(kind)
    settings, manifest, base = scrub(parts.config, "F32"), manifest_of(parts), tiny(kind, 5, vocab_size=320).config
    check_of_base(settings, manifest, base)
    with pytest.raises(KitError, match=r"manifest\.json: base\.layers is 5"):
        check_of_base(settings, manifest, tiny(kind, 6, vocab_size=320).config)
    with pytest.raises(KitError, match=rf"base\.model_type is {kind}"):
        check_of_base(settings, manifest, tiny("gpt2", 5, vocab_size=320).config)


def test_layers_of_another_kind_than_the_base_has_are_noticed():
    parts, base = contents("gemma2"), tiny("gemma2", 5, vocab_size=320).config
    middle = [dataclasses.replace(shape, base=min(shape.base + 1, 3)) for shape in parts.middle[1:]]
    shifted = dataclasses.replace(manifest_of(parts), middle=(parts.middle[0], *middle))
    with pytest.raises(KitError, match="layer_types"):
        check_of_base(scrub(parts.config, "F32"), shifted, base)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_transformers_presets_for_a_family_is_allowed(kind):
    settings = scrub(CONFIG_MAPPING[kind](), "F32")
    assert make_config(check_settings(settings))


def test_a_token_that_the_vocabulary_lacks_leaves_as_none():
    base = contents().config
    base.pad_token_id, base.bos_token_id, base.eos_token_id = -1, 400, [2, 400]
    settings = scrub(base, "F32")
    assert [settings[f"{kind}_token_id"] for kind in ("pad", "bos", "eos")] == [None, None, None]
    base.pad_token_id, base.eos_token_id = 319, [2, 3]
    assert (scrub(base, "F32")["pad_token_id"], scrub(base, "F32")["eos_token_id"]) == (319, [2, 3])
