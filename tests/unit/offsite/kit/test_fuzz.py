"""Kits and returns that were damaged or forged at random: every one is refused with a `KitError`, and left as it is.

A forger repairs sizes and hashes in the manifest, so that the checks behind them are reached. What nobody can see
without a signature is a sound kit with other numbers in it: other weights, another fingerprint, another ε. So repaired
mutations are of structure, and where a changed setting makes another sound kit, that is what must come out.
"""

import copy
import json
import os
import random

import pytest
from support.damage import Subject, byte_mutations, dump, mutations, some_of
from support.kits import copied, header_of, read_json, small_kit, small_return

from siftune.errors import KitError
from siftune.offsite.kit.folder import load_config, read_kit
from siftune.offsite.kit.manifest import canonical
from siftune.offsite.kit.tokenizer import make_tokenizer
from siftune.offsite.protocol.returned import read_return

CODE = {"auto_map": {"AutoConfig": "code.py--Evil"}}
TENSORS = ("emulator.safetensors", "adapter.safetensors")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return small_kit(tmp_path_factory.mktemp("sound") / "kit")


@pytest.fixture(scope="module")
def sound_return(sound, tmp_path_factory):
    return small_return(tmp_path_factory.mktemp("return") / "return", sound)


@pytest.fixture
def kit(sound, tmp_path):
    return Subject(copied(sound.path, tmp_path / "kit"), read_kit)


@pytest.fixture
def returned(sound, sound_return, tmp_path):
    return Subject(copied(sound_return, tmp_path / "return"), lambda folder: read_return(folder, sound))


def free(manifest):
    """What a forger may change in a manifest to get another sound kit: the name of the base, and its depth."""
    rest = copy.deepcopy(manifest)
    rest["base"].pop("fingerprint")
    rest["base"].pop("layers")
    for layer in rest["middle"]:
        layer.pop("base")
    return rest


@pytest.mark.parametrize("which", ["kit", "returned"])
def test_changed_bytes(request, which):
    subject = request.getfixturevalue(which)
    generator = random.Random(1)
    for name in subject.files:
        for what, data in byte_mutations(subject.sound(name), generator, 9):
            if data == subject.sound(name):
                continue
            subject.put(name, data)
            if name == "manifest.json" and which == "kit" and (found := subject.outcome()):
                assert free(read_json(subject.folder / name)) == free(json.loads(subject.sound(name))), what
                assert found.digest
                subject.restore()
            else:
                subject.refused(f"{name}: {what}")
    assert subject.tried > 30


@pytest.mark.parametrize("which", ["kit", "returned"])
def test_changed_manifests(request, which):
    subject = request.getfixturevalue(which)
    whole = json.loads(subject.sound("manifest.json"))
    among = some_of(whole["adapter"], random.Random(0)) if which == "kit" else lambda path: True
    candidates = [*mutations(whole, among)]
    for what, value in random.Random(5).sample(candidates, min(len(candidates), 400)):
        subject.put("manifest.json", dump(value))
        subject.refused(what)
    assert subject.tried > 100


def test_changed_configs_with_repaired_hashes(kit):
    """Either refused, or another sound kit: one whose model has exactly the shapes of its files."""
    whole = json.loads(kit.sound("config.json"))
    generator = random.Random(2)
    accepted = 0
    for what, value in [*generator.sample([*mutations(whole)], 100), ("code", {**whole, **CODE})]:
        kit.put("config.json", dump(value))
        kit.repair()
        if found := kit.outcome():
            accepted += 1
            assert found.config == value, what
            config = load_config(found)
            for field in ("hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
                assert getattr(config, field) == whole[field] or field == "num_attention_heads", what
            assert "x" not in value, what
        kit.restore()
    assert accepted < 30


def test_changed_tokenizers(kit):
    """Either refused, or a tokenizer that loads."""
    files = {name: kit.sound(name) for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")}
    accepted = 0
    for name in ("tokenizer_config.json", "tokenizer.json"):
        whole = json.loads(kit.sound(name))
        candidates = [*mutations(whole, lambda path: "vocab" not in path and path[:1] != ("added_tokens",))]
        for what, value in [*random.Random(3).sample(candidates, 100), ("code", {**whole, **CODE})]:
            try:
                tokenizer = make_tokenizer({**files, name: dump(value)}, 320)
            except KitError:
                continue
            accepted += 1
            assert what not in ("code", "() more"), name
            assert tokenizer.encode("a b") is not None
    assert accepted < 30


def header_mutations(header, generator):
    """Changes of a header, none of which is sound for these data."""
    names = [name for name in header if name != "__metadata__"]
    yield from mutations(header, some_of(names, generator, 1))
    for _ in range(8):
        a, b = generator.sample(names, 2)
        if header[a]["shape"] != header[b]["shape"]:
            yield f"{a} and {b} change names", {**header, a: header[b], b: header[a]}
        yield f"{a} lies on {b}", {**header, a: {**header[a], "data_offsets": header[b]["data_offsets"]}}
        if len(header[a]["shape"]) == 2 and len(set(header[a]["shape"])) == 2:
            yield f"{a} transposed", {**header, a: {**header[a], "shape": header[a]["shape"][::-1]}}
        yield f"{a} has a dimension more", {**header, a: {**header[a], "shape": [*header[a]["shape"], 1]}}
    for dtype in ("I32", "U32", "F64", "BF16", "F8_E4M3", "f32", "BOOL"):
        yield dtype, {**header, names[0]: {**header[names[0]], "dtype": dtype}}
        yield (
            f"all {dtype}",
            {n: entry if n == "__metadata__" else {**entry, "dtype": dtype} for n, entry in header.items()},
        )


@pytest.mark.parametrize(("which", "name"), [("kit", TENSORS[0]), ("kit", TENSORS[1]), ("returned", TENSORS[1])])
def test_changed_headers_with_repaired_hashes(request, which, name):
    subject = request.getfixturevalue(which)
    header, data = header_of(subject.folder / name)
    candidates = [(what, value) for what, value in header_mutations(header, random.Random(4)) if value != header]
    for what, value in random.Random(6).sample(candidates, 100):
        subject.put_tensors(name, dump(value), data)
        subject.repair()
        subject.refused(f"{name}: {what}")
    for length in (0, 1, 7, 10**12, 2**63, 2**64 - 1):
        subject.put(name, length.to_bytes(8, "little") + subject.sound(name)[8:])
        subject.repair()
        subject.refused(f"{name}: header of {length}")
    for what, changed in (("more", data + b"\0" * 4), ("less", data[:-4]), ("none", b"")):
        subject.put_tensors(name, header, changed)
        subject.repair()
        subject.refused(f"{name}: {what} data")
    assert subject.tried > 100


@pytest.mark.parametrize("which", ["kit", "returned"])
@pytest.mark.parametrize("repaired", [False, True])
def test_changed_files(request, which, repaired):
    subject = request.getfixturevalue(which)
    outside = subject.folder.parent / "outside"
    for name in subject.files:
        outside.write_bytes(subject.sound(name))
        for what, replace in {
            "gone": lambda path: None,
            "a link to its like": lambda path: path.symlink_to(outside),
            "a broken link": lambda path: path.symlink_to("nowhere"),
            "a folder": lambda path: path.mkdir(),
            "a pipe": os.mkfifo,
            "capitals": lambda path: path.with_name(path.name.upper()).write_bytes(outside.read_bytes()),
        }.items():
            if repaired and name == "manifest.json":
                continue
            (subject.folder / name).unlink()
            replace(subject.folder / name)
            if repaired:
                subject.repair()
            subject.refused(f"{name} is {what}")
    for name in (
        "model.py",
        "pytorch_model.bin",
        ".hidden",
        "special_tokens_map.json",
        "adapter.safetensors.bak",
        "x\ny",
    ):
        subject.put(name, b"x")
        if repaired:
            manifest = read_json(subject.folder / "manifest.json")
            manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
            subject.put("manifest.json", canonical(manifest))
            subject.repair()
        subject.refused(f"{name} was added")
    (subject.folder / "folder").mkdir()
    subject.refused("a folder was added")


@pytest.mark.parametrize("which", ["kit", "returned"])
def test_files_that_change_places(request, which):
    subject = request.getfixturevalue(which)
    for first in subject.files:
        for second in subject.files:
            if first < second:
                subject.put(first, subject.sound(second))
                subject.put(second, subject.sound(first))
                if "manifest.json" not in (first, second):
                    subject.repair()
                subject.refused(f"{first} and {second}")


def test_left_alone_they_are_read(kit, returned, sound):
    assert kit.outcome().digest == sound.digest
    assert returned.outcome().keys() == sound.manifest.outer.keys()
