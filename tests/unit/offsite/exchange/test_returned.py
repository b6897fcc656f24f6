import errno
import os

import pytest
import safetensors.torch
import torch
from support.kits import copied, edit, header_of, read_json, repair, small_kit, small_return, tuned, write_header

from siftune.base.errors import KitError, ModelError
from siftune.offsite.exchange import returned as returned_module
from siftune.offsite.exchange.returned import read_return, write_return
from siftune.offsite.kit import tensors as kit_tensors
from siftune.offsite.kit.manifest import canonical

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

    monkeypatch.setattr(kit_tensors, "_fill", full)
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(siftune_return=2), "siftune_return is 2, a protocol that this siftune does not know"),
        (lambda m: m.update(author="x"), "has the unknown key 'author'"),
        (lambda m: m.pop("kit") is None, "has no kit"),
        (lambda m: m.update(kit=7), "kit is 7"),
        (lambda m: m.update(files={}), "files has no adapter.safetensors"),
        (lambda m: m["files"].update({"../x": {}}), "files has the unknown key '../x'"),
        (lambda m: m.update(siftune_kit=m.pop("siftune_return")), "has no siftune_return"),
    ],
)
def test_every_field_of_its_manifest_is_checked(kit, folder, change, words):
    manifest = read_json(folder / "manifest.json")
    change(manifest)
    (folder / "manifest.json").write_bytes(canonical(manifest))
    with pytest.raises(KitError, match=words):
        read_return(folder, kit)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda h: h[NAME].update(shape=[32, 48]),
            rf"adapter.safetensors: {NAME} is F32 \[32, 48\], but manifest.json of",
        ),
        (lambda h: h[NAME].update(dtype="I32"), f"adapter.safetensors: header.{NAME}.dtype is 'I32'"),
        (lambda h: h.update({"first.0.x": h.pop(NAME)}), f"adapter.safetensors has no tensor '{NAME}'"),
        (lambda h: h["__metadata__"].update(note="x"), "__metadata__"),
    ],
)
def test_its_tensors_are_held_to_the_kit(kit, folder, change, words):
    header, data = header_of(folder / "adapter.safetensors")
    change(header)
    write_header(folder / "adapter.safetensors", header, data)
    repair(folder)
    with pytest.raises(KitError, match=words):
        read_return(folder, kit)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_must_be_finite(kit, folder, value):
    tensors = tuned(kit)
    tensors["last.0.input_layernorm.weight"][-1] = value
    safetensors.torch.save_file(tensors, folder / "adapter.safetensors", {"format": "pt"})
    repair(folder)
    with pytest.raises(KitError, match=r"adapter\.safetensors: last\.0\.input_layernorm\.weight has values"):
        read_return(folder, kit)


def test_bytes_are_held_to_the_hash(kit, folder):
    path = folder / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(KitError, match=r"adapter\.safetensors has the SHA-256"):
        read_return(folder, kit)
    path.write_bytes(data + b"x")
    with pytest.raises(KitError, match=r"adapter\.safetensors has \d+ bytes, but manifest\.json: files"):
        read_return(folder, kit)


def test_a_file_that_is_larger_than_the_kit_allows_is_not_read(kit, folder, monkeypatch):
    os.truncate(folder / "adapter.safetensors", 10**11)
    monkeypatch.setattr(returned_module, "open_tensors", lambda *_: pytest.fail("read"))
    with pytest.raises(KitError, match=r"adapter\.safetensors has 100000000000 bytes, more than"):
        read_return(folder, kit)


def other_values(path):
    """The bytes of a file like this one, sound but for its hash."""
    return path.read_bytes()[:-1] + b"\x01"


CHANGES = {
    "written over": (lambda path: path.write_bytes(other_values(path)), "has the SHA-256"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 4), "became shorter while it was read"),
    "grown": (lambda path: path.open("ab").write(b"x" * 2**20), "grew while it was read"),
    "exchanged": (lambda path: exchange(path, other_values(path)), None),
    "a link": (lambda path: (path.unlink(), path.symlink_to("/etc/passwd")), None),
    "gone": (lambda path: path.unlink(), None),
}


def exchange(path, data):
    """Put another file in the place of one."""
    beside = path.with_name("beside")
    beside.write_bytes(data)
    os.replace(beside, path)


@pytest.mark.parametrize("how", CHANGES)
def test_what_was_checked_is_what_is_loaded(kit, folder, monkeypatch, how):
    """The file changes between the look at its header and the reading of its tensors: refused, or of no effect."""
    change, words = CHANGES[how]
    compare = returned_module.check_specs

    def interfere(*arguments):
        compare(*arguments)
        change(folder / "adapter.safetensors")

    monkeypatch.setattr(returned_module, "check_specs", interfere)
    if words is not None:
        with pytest.raises(KitError, match=f"adapter.safetensors {words}"):
            read_return(folder, kit)
    else:
        found = read_return(folder, kit)
        assert all(torch.equal(found[name], tensor) for name, tensor in tuned(kit).items())


@pytest.mark.parametrize("name", ["manifest.json", "adapter.safetensors"])
def test_a_file_that_becomes_a_link_or_a_pipe_is_not_read(kit, folder, tmp_path, monkeypatch, name):
    (tmp_path / "outside").write_bytes((folder / name).read_bytes())
    path, listed = folder / name, returned_module.list_files
    for replace in (lambda: path.symlink_to(tmp_path / "outside"), lambda: os.mkfifo(path)):

        def interfere(*arguments, replace=replace):
            sizes = listed(*arguments)
            path.unlink()
            replace()
            return sizes

        monkeypatch.setattr(returned_module, "list_files", interfere)
        with pytest.raises(KitError, match=rf"{name} (cannot be read|is a folder or a device)"):
            read_return(folder, kit)
        monkeypatch.undo()
        path.unlink()
        path.write_bytes((tmp_path / "outside").read_bytes())


def test_a_hard_link_is_read_as_what_it_is(kit, folder, tmp_path):
    """It is a regular file, and nothing is written to it: what another name for it does is noticed by the hash."""
    path = folder / "adapter.safetensors"
    os.link(path, tmp_path / "same")
    assert read_return(folder, kit)
    (tmp_path / "same").write_bytes(other_values(path))
    with pytest.raises(KitError, match=r"adapter\.safetensors has the SHA-256"):
        read_return(folder, kit)


@pytest.mark.parametrize("name", ["manifest.json", "adapter.safetensors"])
def test_missing_strange_and_linked_files(kit, folder, tmp_path, name):
    (folder / name).rename(tmp_path / "outside")
    with pytest.raises(KitError, match=f"it has no {name}"):
        read_return(folder, kit)
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(KitError, match=f"{name} is a link"):
        read_return(folder, kit)
    (folder / name).unlink()
    (tmp_path / "outside").rename(folder / name)
    assert read_return(folder, kit)
    (folder / "pickle.bin").write_bytes(b"x")
    with pytest.raises(KitError, match=r"'pickle\.bin' is in it and does not belong there"):
        read_return(folder, kit)


def test_a_run_around_a_return_is_told_apart(kit, folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "return")
    with pytest.raises(KitError, match=r"it is a whole run; the return is in it: give .*run/return"):
        read_return(run, kit)


def test_a_kit_is_no_return_and_nothing_is_not_either(kit, tmp_path):
    with pytest.raises(KitError, match="does not belong there"):
        read_return(kit.path, kit)
    with pytest.raises(KitError, match="the folder cannot be read"):
        read_return(tmp_path / "missing", kit)


def test_edits_that_keep_the_form_are_read_as_before(kit, folder):
    edit(folder, "manifest.json", lambda m: None)
    assert read_return(folder, kit)
