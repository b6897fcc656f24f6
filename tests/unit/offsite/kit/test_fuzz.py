"""Kits and returns whose files or manifests were damaged or forged: every one is refused, and left as it is.

What is refused by its values though all hashes were repaired stands in ../test_fuzz.py.
"""

import copy
import json
import os
import random

import pytest
from support.damage import Subject, byte_mutations, dump, mutations, some_of
from support.kits import copied, read_json, small_kit, small_return

from siftune.offsite.exchange.returned import read_return
from siftune.offsite.kit.folder import read_kit
from siftune.offsite.kit.manifest import canonical


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


SAMPLES = [pytest.param(2, 40), pytest.param(9, 400, marks=pytest.mark.fuzz)]  # of bytes in a file, of manifests


@pytest.mark.parametrize("which", ["kit", "returned"])
@pytest.mark.parametrize(("count", "_"), SAMPLES)
def test_changed_bytes(request, which, count, _):
    subject = request.getfixturevalue(which)
    generator = random.Random(1)
    for name in subject.files:
        for what, data in byte_mutations(subject.sound(name), generator, count):
            if data == subject.sound(name):
                continue
            subject.put(name, data)
            if name == "manifest.json" and which == "kit" and (found := subject.outcome()):
                assert free(read_json(subject.folder / name)) == free(json.loads(subject.sound(name))), what
                assert found.digest
                subject.restore()
            else:
                subject.refused(f"{name}: {what}")
    assert subject.tried >= 2 * count


@pytest.mark.parametrize("which", ["kit", "returned"])
@pytest.mark.parametrize(("_", "count"), SAMPLES)
def test_changed_manifests(request, which, count, _):
    subject = request.getfixturevalue(which)
    whole = json.loads(subject.sound("manifest.json"))
    among = some_of(whole["adapter"], random.Random(0)) if which == "kit" else lambda path: True
    candidates = [*mutations(whole, among)]
    for what, value in random.Random(5).sample(candidates, min(len(candidates), count)):
        subject.put("manifest.json", dump(value))
        subject.refused(what)
    assert subject.tried >= min(len(candidates), count)


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
