"""Hostile returns: every case is refused by its check, in a sentence that names file and field; nothing is written.

All hashes are right, unless they are what was changed. Limits on updates are tested in test_plug.py, and votes in
test_merge.py.
"""

import os

import pytest
import torch
from safetensors.torch import load, save
from support.hostile import REMOVED, forge, refused
from support.kits import copied, small_kit, small_return, tuned

from siftune.offsite.exchange import returned
from siftune.offsite.exchange.returned import read_return, write_return

MANIFEST, OUTER = "manifest.json", "adapter.safetensors"
Q, NORM = "first.0.self_attn.q_proj.weight", "first.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return small_kit(tmp_path_factory.mktemp("kit") / "kit")


@pytest.fixture(scope="module")
def whole(kit, tmp_path_factory):
    return small_return(tmp_path_factory.mktemp("whole") / "return", kit)


@pytest.fixture(scope="module")
def thin(kit, tmp_path_factory):
    """Factors of rank 2 of one matrix."""
    factors = {f"{Q}.up": torch.ones(32, 2), f"{Q}.down": torch.ones(2, 32)}
    return write_return(tmp_path_factory.mktemp("thin") / "return", factors, kit)


def check(kit, sound, tmp_path, case):
    name, path, value, words = case
    refused(lambda folder: read_return(folder, kit), forge(sound, tmp_path, name, path, value), name, words)


@pytest.mark.parametrize("name", [MANIFEST, OUTER])
@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"),
        lambda path: (path.rename(path.parent.parent / "outside"), path.symlink_to("../outside")),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["missing", "empty", "cut", "changed", "link", "pipe", "folder"],
)
def test_changed_files(kit, whole, tmp_path, name, change):
    folder = copied(whole, tmp_path / "return")
    change(folder / name)
    refused(lambda folder: read_return(folder, kit), folder, name)


PROMISE = {
    "epsilon": 8.0, "delta": 1e-5, "noise_multiplier": 1.0, "clip": 1.0, "sampling_rate": 0.1,
    "expected_batch": 4, "steps": 3, "accountant": "opacus PRV", "accountant_version": "1.5.4",
    "unit": "one training row, there or not",
}  # fmt: skip
MANIFESTS = [
    ("siftune_return", 2, "siftune_return is 2, a protocol"),
    ("siftune_return", True, "siftune_return is True, a protocol"),
    ("siftune_return", REMOVED, "has no siftune_return"),
    ("siftune_kit", 1, "has the unknown key 'siftune_kit'"),
    ("kit", REMOVED, "has no kit"),
    ("kit", "0" * 64, "it was made for another kit"),
    ("files", {}, "files has no adapter.safetensors"),
    ("files", lambda table: table | {"../outside": {}}, "files has the unknown key '../outside'"),
    ("files/adapter.safetensors/bytes", 2**63, "bytes is 9223372036854775808, not a whole number"),
    ("lora", {}, "lora has 0 entries"),
    ("lora", {Q: 1}, "adapter.safetensors has no tensor .*q_proj.weight.up"),
    ("lora", {Q: 10**9}, f"lora.{Q} is 1000000000, not a whole number from 1 to 15"),
    ("lora", {Q: True}, f"lora.{Q} is True, not a whole number"),
    ("lora", {NORM: 1}, f"lora has {NORM}, of which no factors are smaller"),
    ("lora", {"../x": 1}, "lora has the unknown key '../x'"),
    ("privacy", {}, "privacy has no epsilon"),
    ("privacy", PROMISE | {"epsilon": -1}, "privacy.epsilon is -1, not a number from 0 to 1000"),
    ("privacy", PROMISE | {"delta": 1}, "privacy.delta is 1, not a number"),
    ("privacy", PROMISE | {"steps": 1.0}, "privacy.steps is 1.0, not a whole number"),
    ("privacy", PROMISE | {"accountant_version": "\u202e"}, "privacy.accountant_version is"),
]


@pytest.mark.parametrize(("path", "value", "words"), MANIFESTS)
def test_manifests(kit, whole, tmp_path, path, value, words):
    check(kit, whole, tmp_path, (MANIFEST, path, value, words))


def with_tensors(**changes):
    """Other tensors in the file: functions of the old ones, or None to remove one."""

    def change(data):
        tensors = load(data)
        for name, new in changes.items():
            name = {"q": Q, "up": f"{Q}.up", "down": f"{Q}.down", "norm": NORM}.get(name, name)
            old = tensors.pop(name, torch.ones(2, 2))
            tensors |= {} if new is None else {name: new(old).contiguous()}
        return save(tensors, {"format": "pt"})

    return change


def filled(value):
    return lambda tensor: torch.full_like(tensor, value)


TENSORS = [
    ("whole", with_tensors(q=None), f"has no tensor '{Q}', which manifest.json of the kit has"),
    ("whole", with_tensors(q=lambda t: t[:16]), rf"{Q} is F32 \[16, 32\], but manifest.json of the kit says"),
    ("whole", with_tensors(norm=lambda t: t[None]), rf"{NORM} is F32 \[1, 32\], but manifest.json of the kit says"),
    ("whole", with_tensors(q=lambda t: t.half()), rf"{Q} is F16 \[32, 32\], but manifest.json of the kit says F32"),
    ("whole", with_tensors(lm_head=lambda t: t), "has a tensor 'lm_head', which .* lacks"),
    ("whole", with_tensors(norm=filled(float("nan"))), f"{NORM} has values that are NaN or infinite"),
    ("whole", with_tensors(norm=filled(65505.0)), f"{NORM} has the value 65505; up to 65504"),
    ("whole", lambda data: data + bytes(4), "cannot be read as safetensors"),
    ("whole", lambda data: data[:-4], "cannot be read as safetensors"),
    ("whole", lambda data: (10**12).to_bytes(8, "little") + data[8:], "cannot be read as safetensors"),
    ("thin", with_tensors(down=None), f"has no tensor '{Q}.down', which manifest.json: lora has"),
    ("thin", with_tensors(up=lambda t: t[:, :1]), rf"{Q}.up is F32 \[32, 1\], but manifest.json: lora says"),
    ("thin", with_tensors(down=lambda t: t.T), rf"{Q}.down is F32 \[32, 2\], but manifest.json: lora says"),
    ("thin", with_tensors(q=lambda t: t), f"has a tensor '{Q}', which manifest.json: lora lacks"),
    ("thin", with_tensors(up=filled(6e4), down=filled(6e4)), f"{Q}, with its factors has the value"),
]


@pytest.mark.parametrize(("kind", "change", "words"), TENSORS)
def test_tensors(request, kit, tmp_path, kind, change, words):
    check(kit, request.getfixturevalue(kind), tmp_path, (OUTER, "", change, words))


def test_an_additional_file(kit, whole, tmp_path):
    check(kit, whole, tmp_path, ("pickle.bin", "", b"x", "is in it and does not belong there"))


def test_a_file_larger_than_its_manifest_says_is_not_opened(kit, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(returned, "open_tensors", lambda *_: pytest.fail("opened"))
    folder = copied(whole, tmp_path / "return")
    os.truncate(folder / OUTER, 10**11)
    refused(lambda folder: read_return(folder, kit), folder, OUTER, "has 100000000000 bytes, but manifest.json")


def test_the_untouched_copies_are_read(kit, whole, thin, tmp_path):
    read = read_return(forge(whole, tmp_path, OUTER, "", lambda data: data), kit)
    assert all(torch.equal(read[name], tensor) for name, tensor in tuned(kit).items())
    assert read_return(thin, kit).keys() == kit.manifest.outer.keys()
