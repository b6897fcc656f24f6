import errno
import os

import pytest
import torch
from support.kits import copied, header_of, read_json, small_kit, small_return, tuned

from siftune.base.errors import KitError, ModelError
from siftune.offsite.exchange import returned as returned_module
from siftune.offsite.exchange.returned import read_return, write_return
from siftune.offsite.kit import tensors as kit_tensors

NAME = "first.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return small_kit(tmp_path_factory.mktemp("kit") / "kit")


@pytest.fixture(scope="module")
def sound(kit, tmp_path_factory):
    return small_return(tmp_path_factory.mktemp("return") / "return", kit)


@pytest.fixture
def folder(sound, tmp_path):
    """A copy to damage."""
    return copied(sound, tmp_path / "return")


def test_what_is_written_is_read(kit, sound):
    assert sorted(path.name for path in sound.iterdir()) == ["adapter.safetensors", "manifest.json"]
    found, wanted = read_return(str(sound), kit), tuned(kit)
    assert found.keys() == wanted.keys() == kit.manifest.outer.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    manifest = read_json(sound / "manifest.json")
    assert sorted(manifest) == ["files", "kit", "siftune_return"]
    assert manifest["siftune_return"] == 1
    assert manifest["kit"] == kit.digest
    assert list(manifest["files"]) == ["adapter.safetensors"]
    assert header_of(sound / "adapter.safetensors")[0]["__metadata__"] == {"format": "pt"}


def test_the_kits_own_dtype_comes_back(kit, tmp_path):
    import dataclasses

    from support.kits import contents

    from siftune.offsite.kit.folder import write_kit

    parts = contents()
    half = {name: tensor.bfloat16() for name, tensor in parts.outer.items()}
    other = write_kit(tmp_path / "kit", dataclasses.replace(parts, outer=half))
    with pytest.raises(KitError, match=r"what was tuned: .* is F32 .*, but manifest\.json of the kit says BF16"):
        write_return(tmp_path / "return", parts.outer, other)
    read = read_return(write_return(tmp_path / "return", half, other), other)
    assert {tensor.dtype for tensor in read.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NAME) is None, f"what was tuned has no tensor '{NAME}'"),
        (lambda t: t.update(x=torch.ones(1)), "what was tuned has a tensor 'x'"),
        (lambda t: t.update({NAME: t[NAME].T}), rf"what was tuned: {NAME} is F32 \[32, 48\]"),
        (lambda t: t.update({NAME: t[NAME].half()}), f"what was tuned: {NAME} is F16"),
        (lambda t: t.update({NAME: t[NAME].double()}), r"torch\.float64"),
        (lambda t: t[NAME].fill_(float("nan")) is None, f"{NAME} has values that are NaN or infinite"),
    ],
)
def test_tensors_that_do_not_fit_are_not_written(kit, tmp_path, change, words):
    tensors = tuned(kit)
    change(tensors)
    with pytest.raises(KitError, match=words):
        write_return(tmp_path / "return", tensors, kit)
    assert [*tmp_path.iterdir()] == []


def test_a_full_disk_leaves_nothing_behind(kit, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kit_tensors, "save_file", full)
    with pytest.raises(KitError, match="No space left on device"):
        write_return(tmp_path / "return", tuned(kit), kit)
    monkeypatch.undo()

    monkeypatch.setattr(returned_module, "canonical", full)
    with pytest.raises(KitError, match="No space left on device"):
        write_return(tmp_path / "return", tuned(kit), kit)
    assert [*tmp_path.iterdir()] == []


def test_a_folder_in_use_is_not_touched(kit, folder):
    with pytest.raises(ModelError, match="not empty"):
        write_return(folder, tuned(kit, seed=2), kit)
    assert torch.equal(read_return(folder, kit)[NAME], tuned(kit)[NAME])


def test_a_return_for_another_kit_is_refused_with_both_hashes(sound, kit, tmp_path):
    other = small_kit(tmp_path / "other", rms_norm_eps=1e-5)
    with pytest.raises(KitError) as caught:
        read_return(sound, other)
    assert str(caught.value) == (
        f"return {sound}: manifest.json: kit is {kit.digest}, but the manifest.json of {other.path} has the SHA-256 "
        f"{other.digest}: it was made for another kit; ask whoever made it for a sound copy"
    )


def other_values(path):
    """The bytes of a file like this one, sound but for its hash."""
    return path.read_bytes()[:-1] + b"\x01"


def test_a_hard_link_is_read_as_what_it_is(kit, folder, tmp_path):
    """It is a regular file, and nothing is written to it: what another name for it does is noticed by the hash."""
    path = folder / "adapter.safetensors"
    os.link(path, tmp_path / "same")
    assert read_return(folder, kit)
    (tmp_path / "same").write_bytes(other_values(path))
    with pytest.raises(KitError, match=r"adapter\.safetensors has the SHA-256"):
        read_return(folder, kit)


def test_a_run_around_a_return_is_told_apart(kit, folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "return")
    with pytest.raises(KitError, match=r"give .*run/return"):
        read_return(run, kit)


def test_a_kit_is_no_return_and_nothing_is_not_either(kit, tmp_path):
    with pytest.raises(KitError, match="does not belong there"):
        read_return(kit.path, kit)
    with pytest.raises(KitError, match="the folder cannot be read"):
        read_return(tmp_path / "missing", kit)
