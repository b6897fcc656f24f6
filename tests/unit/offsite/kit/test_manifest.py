"""A kit's manifest, and the fingerprint of its base."""

import copy
import dataclasses
import hashlib
import json
import struct

import pytest
import torch
from support.kits import contents
from support.tiny import tiny

from siftune.base.errors import KitError
from siftune.offsite.emulator.model import LayerShape
from siftune.offsite.kit import manifest as fingerprint_module
from siftune.offsite.kit.manifest import (
    LIMITS,
    MAX_LAYERS,
    OPTIONAL,
    REQUIRED,
    Calibration,
    FileSpec,
    Manifest,
    canonical,
    dump_manifest,
    fingerprint,
    parse_files,
    parse_manifest,
)
from siftune.offsite.kit.tensors import spec_of


@pytest.fixture(scope="module")
def manifest():
    parts = contents()
    return Manifest(
        model_type="llama",
        depth=parts.depth,
        fingerprint=parts.fingerprint,
        calibration=parts.calibration,
        split=parts.split,
        middle=tuple(parts.middle),
        outer={name: spec_of(tensor) for name, tensor in sorted(parts.outer.items())},
        files={name: FileSpec(7, "0" * 64) for name in sorted(REQUIRED)},
    )


def test_what_is_written_is_read(manifest):
    assert parse_manifest(dump_manifest(manifest)) == manifest
    assert manifest.emulator_depth == 5


def test_own_texts_have_a_seed(manifest):
    own = dataclasses.replace(manifest, calibration=Calibration("own texts", 4, 9, 0))
    assert parse_manifest(dump_manifest(own)) == own


def test_an_mlp_is_factored_or_has_fewer_channels(manifest):
    shape = LayerShape(1, {"self_attn.q_proj": 4, "mlp.up_proj": 3})
    both = dataclasses.replace(manifest, middle=(shape, *manifest.middle[1:2]))
    assert parse_manifest(dump_manifest(both)).middle[0] == shape
    narrow = dataclasses.replace(both, middle=(dataclasses.replace(shape, channels=5), *manifest.middle[1:2]))
    with pytest.raises(KitError, match=r"middle\.0\.ranks .*mlp\.up_proj"):
        parse_manifest(dump_manifest(narrow))


def test_it_looks_as_documented(manifest):
    value = json.loads(dump_manifest(manifest))
    assert sorted(value) == ["adapter", "base", "calibration", "files", "middle", "siftune_kit", "split"]
    assert value["siftune_kit"] == 1
    assert value["base"] == {"model_type": "llama", "layers": 5, "fingerprint": manifest.fingerprint}
    assert value["calibration"] == {"kind": "rows", "number": 3, "tokens": 9, "seed": None}
    assert value["split"] == {"first": 1, "last": 1}
    assert value["middle"][1] == {
        "base": 2,
        "ranks": {"self_attn.q_proj": 4},
        "channels": 12,
    }
    assert value["adapter"]["first.0.self_attn.q_proj.weight"] == {"shape": [32, 32], "dtype": "F32"}
    assert value["files"]["config.json"] == {"bytes": 7, "sha256": "0" * 64}


def at(*path):
    """Set a field."""

    def change(value, new):
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = new

    return change


Q = "self_attn.q_proj"
DEFECTS = [
    (at("siftune_kit"), 2, r"siftune_kit is 2, a protocol that this siftune does not know; it knows 1"),
    (at("siftune_kit"), True, "siftune_kit is True, a protocol"),
    (at("siftune_kit"), 1.0, "siftune_kit is 1.0, a protocol"),
    (at("siftune_kit"), "1", "siftune_kit is '1', a protocol"),
    (at("author"), "me", "manifest.json has the unknown key 'author'"),
    (at("base"), [], r"base is \[\], not an object"),
    (at("base", "name"), "x", "base has the unknown key 'name'"),
    (at("base", "model_type"), "bert", "base.model_type is 'bert'; known are llama"),
    (at("base", "model_type"), ["llama"], "base.model_type is"),
    (at("base", "layers"), 10**9, f"base.layers is 1000000000, not a whole number from 2 to {MAX_LAYERS}"),
    (at("base", "layers"), 5.0, "base.layers is 5.0, not a whole number"),
    (at("base", "layers"), True, "base.layers is True, not a whole number"),
    (at("base", "layers"), 2, "split has 1 first and 1 last of 2 layers"),
    (at("base", "layers"), 4, "middle has 3 items"),
    (at("base", "fingerprint"), "0" * 63, "base.fingerprint is"),
    (at("base", "fingerprint"), "A" * 64, "base.fingerprint is"),
    (at("calibration"), None, "calibration is None, not an object"),
    (at("calibration", "file"), "x", "calibration has the unknown key 'file'"),
    (at("calibration", "kind"), "own", "calibration.kind is 'own'; known are rows, own texts"),
    (at("calibration", "number"), 0, "calibration.number is 0, not a whole number"),
    (at("calibration", "tokens"), True, "calibration.tokens is True, not a whole number"),
    (at("calibration", "seed"), 1.0, "calibration.seed is 1.0, not a whole number"),
    (at("calibration", "seed"), 0, "calibration is of rows; own texts have a seed, rows have none"),
    (at("calibration", "kind"), "own texts", "calibration is of own texts; own texts have a seed"),
    (at("split", "first"), -1, "split.first is -1"),
    (at("split", "last"), 1.0, "split.last is 1.0"),
    (at("split", "middle"), 1, "split has the unknown key 'middle'"),
    (at("split"), {"first": 0, "last": 0}, "split has 0 first and 0 last of 5 layers; some must be, and not all"),
    (at("split"), {"first": 4, "last": 1}, "split has 4 first and 1 last of 5 layers; some must be, and not all"),
    (at("middle"), [], "middle has no layer"),
    (at("middle"), {}, r"middle is \{\}"),
    (at("middle", 0), 3, "middle.0 is 3, not an object"),
    (at("middle", 0, "score"), 3, "middle.0 has the unknown key 'score'"),
    (at("middle", 0, "base"), 0, "middle.0.base is 0, not a whole number from 1 to 3"),
    (at("middle", 0, "base"), 4, "middle.0.base is 4, not a whole number from 1 to 3"),
    (at("middle", 0, "base"), 2, "middle.1.base is 2, but a layer before it is the base's layer 2"),
    (at("middle", 1, "base"), 1, "middle.1.base is 1, but a layer before it is the base's layer 1"),
    (at("middle", 0, "base"), 1.0, "middle.0.base is 1.0, not a whole number"),
    (at("middle", 0, "ranks", Q), 4.0, f"middle.0.ranks.{Q} is 4.0, not a whole number"),
    (at("middle", 0, "ranks", "mlp.up_proj"), 3, "middle.0.ranks has the unknown key 'mlp.up_proj'"),
    (at("middle", 0, "ranks", "mlp.gate"), 3, "middle.0.ranks has the unknown key 'mlp.gate'"),
    (at("middle", 0, "ranks", Q), 0, f"middle.0.ranks.{Q} is 0"),
    (at("middle", 0, "ranks", Q), 10**9, f"middle.0.ranks.{Q} is 1000000000"),
    (at("middle", 0, "channels"), 0, "middle.0.channels is 0"),
    (at("middle", 0, "channels"), 10**9, "middle.0.channels is 1000000000"),
    (at("middle", 0, "channels"), False, "middle.0.channels is False"),
    (at("adapter"), {}, "adapter has 0 entries"),
    (at("adapter", "middle.0.x"), {"shape": [1], "dtype": "F32"}, "name of a tensor is 'middle.0.x'"),
    (at("adapter", "first.../../x"), {"shape": [1], "dtype": "F32"}, "name of a tensor is 'first.../../x'"),
    (at("adapter", "first.0.x"), {"shape": [10**9], "dtype": "F32"}, "adapter.first.0.x.shape is 1000000000"),
    (at("adapter", "first.0.x"), {"shape": [1], "dtype": "F16"}, "adapter has tensors of several dtypes"),
    (at("files"), {}, "files has no config.json"),
    (at("files", "../x"), {"bytes": 1, "sha256": "0" * 64}, "files has the unknown key '../x'"),
    (at("files", "/etc/passwd"), {"bytes": 1, "sha256": "0" * 64}, "files has the unknown key '/etc/passwd'"),
    (at("files", "model.py"), {"bytes": 1, "sha256": "0" * 64}, "files has the unknown key 'model.py'"),
    (at("files", "config.json", "bytes"), 10**12, "files.config.json.bytes is 1000000000000"),
    (at("files", "config.json", "bytes"), 7.0, "files.config.json.bytes is 7.0, not a whole number"),
    (at("adapter", "first.0.x"), {"shape": [1.0], "dtype": "F32"}, "adapter.first.0.x.shape is 1.0, not a whole"),
    (at("files", "config.json", "sha256"), "0" * 65, "files.config.json.sha256 is"),
    (at("files", "config.json", "path"), "x", "files.config.json has the unknown key 'path'"),
]


@pytest.mark.parametrize(("change", "new", "words"), DEFECTS, ids=[words[:50] for _, _, words in DEFECTS])
def test_every_field_is_checked_and_named(manifest, change, new, words):
    value = json.loads(dump_manifest(manifest))
    change(value, new)
    with pytest.raises(KitError, match=words) as caught:
        parse_manifest(canonical(value))
    assert str(caught.value).startswith("manifest.json")


def walk(value, path=()):
    """Every object of a tree."""
    if isinstance(value, dict):
        yield path, value
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from walk(child, (*path, key))


def test_no_key_may_be_missing_but_a_rank(manifest):
    whole = json.loads(dump_manifest(manifest))
    for path, found in walk(whole):
        for key in found:
            if "ranks" in path or path == ("adapter",):
                continue  # which there are is checked against the model
            value = copy.deepcopy(whole)
            place = value
            for step in path:
                place = place[step]
            del place[key]
            with pytest.raises(KitError, match=f"has no {key}"):
                parse_manifest(canonical(value))


@pytest.mark.parametrize(
    "change", [lambda d: d + b"\n", lambda d: d[:-1], lambda d: d.replace(b"  ", b" "), lambda d: b" " + d]
)
def test_there_is_one_form_only(manifest, change):
    with pytest.raises(KitError, match="not in the form that siftune writes"):
        parse_manifest(change(dump_manifest(manifest)))


def test_a_newer_protocol_is_named_before_its_new_keys(manifest):
    value = json.loads(dump_manifest(manifest)) | {"siftune_kit": 2, "new": 1}
    with pytest.raises(KitError, match="siftune_kit is 2, a protocol"):
        parse_manifest(canonical(value))


@pytest.mark.parametrize("value", [b"[]", b"null", b"{}", b'"siftune_kit"', b'{"siftune_return": 1}'])
def test_something_else(value):
    with pytest.raises(KitError, match=r"manifest\.json has no siftune_kit"):
        parse_manifest(value)


def test_bare_layers_are_allowed(manifest):
    bare = dataclasses.replace(manifest, middle=(LayerShape(2),))
    assert parse_manifest(dump_manifest(bare)) == bare


def test_every_file_has_a_limit_and_the_chat_template_may_be_left_out():
    assert {*REQUIRED, *OPTIONAL, "manifest.json"} == set(LIMITS)
    table = {name: {"bytes": 1, "sha256": "0" * 64} for name in (*REQUIRED, *OPTIONAL)}
    assert set(parse_files(table, REQUIRED, OPTIONAL)) == {*REQUIRED, "chat_template.jinja"}
    table["emulator.safetensors"]["bytes"] = LIMITS["emulator.safetensors"] + 1
    with pytest.raises(KitError, match=r"files\.emulator\.safetensors\.bytes"):
        parse_files(table, REQUIRED, OPTIONAL)


def test_fingerprints_are_of_names_shapes_and_float32_values(monkeypatch):
    model = tiny("llama", 2, tie_word_embeddings=True)
    digest = hashlib.sha256()
    for name in sorted(model.state_dict()):
        if name != "lm_head.weight":  # tied
            tensor = model.state_dict()[name]
            digest.update(json.dumps([name, list(tensor.shape)]).encode())
            digest.update(struct.pack(f"<{tensor.numel()}f", *tensor.flatten().tolist()))
    assert fingerprint(model) == digest.hexdigest()
    monkeypatch.setattr(fingerprint_module, "_CHUNK", 7)
    assert fingerprint(model) == digest.hexdigest()


def test_fingerprints_do_not_depend_on_how_a_checkpoint_is_loaded():
    half = tiny("gpt2", 2).bfloat16()
    wide = copy.deepcopy(half).float()
    assert fingerprint(wide) == fingerprint(half)
    with torch.no_grad():
        wide.transformer.h[1].ln_1.weight[3] += 2e-7
    assert fingerprint(wide) != fingerprint(half)
    assert fingerprint(tiny("gpt2", 3)) != fingerprint(tiny("gpt2", 2))


def test_weights_without_values_have_no_fingerprint():
    with pytest.raises(KitError, match="has no values"):
        fingerprint(tiny("llama", 2).to("meta"))
