import copy
import dataclasses
import errno
import struct

import pytest
import torch
from support.kits import contents, copied, header_of, small_kit, tensor_specs
from support.tokenizer import byte_tokenizer

from siftune.base.errors import InputError, KitError, ModelError
from siftune.offsite.emulator.model import Split
from siftune.offsite.kit import folder as kit_module
from siftune.offsite.kit import tensors
from siftune.offsite.kit.folder import read_kit, write_kit


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return small_kit(tmp_path_factory.mktemp("sound") / "kit")


@pytest.fixture
def folder(sound, tmp_path):
    """A copy to damage."""
    return copied(sound.path, tmp_path / "kit")


def test_the_same_contents_give_the_same_bytes(sound, folder, tmp_path):
    again = small_kit(tmp_path / "again")
    assert again.digest == sound.digest
    assert read_kit(str(folder)).digest == sound.digest


def test_half_precision(tmp_path):
    kit = small_kit(tmp_path / "kit", dtype=torch.bfloat16)
    assert kit.config["dtype"] == "bfloat16"
    assert {spec.dtype for spec in tensor_specs(kit.path / "emulator.safetensors").values()} == {"BF16"}
    assert {spec.dtype for spec in kit.manifest.outer.values()} == {"F32"}


def canaries():
    """Contents with everything planted that must not leave."""
    parts = contents()
    config = copy.deepcopy(parts.config)
    config._name_or_path = "/home/CANARY/model"
    config.private_note = {"CANARY": ["CANARY"]}
    config.id2label = {0: "CANARY"}
    config.architectures = ["CANARY"]
    config.quantization_config = {"CANARY": 1}
    config.rope_parameters = {**config.rope_parameters, "CANARY": "CANARY"}
    tokenizer = byte_tokenizer()
    tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = "/home/CANARY/model"
    tokenizer.init_kwargs |= {"CANARY": "CANARY", "vocab_file": "/home/CANARY/vocab"}
    tokenizer.backend_tokenizer.enable_truncation(7919)
    tokenizer.backend_tokenizer.enable_padding(length=7919, pad_token="CANARY")
    marked = torch.full((64,), struct.unpack("<f", b"CNRY")[0])  # a part of a larger tensor that must stay behind
    norm = next(name for name in parts.frozen if name.endswith("norm.weight"))
    frozen = {**parts.frozen, norm: torch.cat([parts.frozen[norm], marked])[:32]}
    return dataclasses.replace(parts, config=config, tokenizer=tokenizer, frozen=frozen)


def every_byte(folder):
    """Names and contents of a kit."""
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes()
        yield path.name, path.name.encode() + b"\0" + data


def test_nothing_else_leaves(tmp_path):
    out = tmp_path / "CANARY" / "kit for CANARY"
    out.parent.mkdir()
    kit = write_kit(out, canaries())
    import transformers

    forbidden = (
        "CANARY",
        "CNRY",
        "7919",
        str(tmp_path),
        tmp_path.name,
        transformers.__version__,
        "siftune-",
        "partial",
    )
    for name, data in every_byte(kit.path):
        for word in forbidden:
            assert word.lower().encode() not in data.lower(), f"{word} in {name}"
    for name in ("emulator", "adapter"):
        assert header_of(kit.path / f"{name}.safetensors")[0]["__metadata__"] == {"format": "pt"}
    assert [path.name for path in out.parent.iterdir()] == ["kit for CANARY"]


def broken_contents():
    parts = contents()
    some = next(iter(parts.outer))
    nan = torch.full_like(parts.outer[some], float("nan"))
    return {
        "NaN": (dataclasses.replace(parts, outer={**parts.outer, some: nan}), "NaN or infinite"),
        "float64": (dataclasses.replace(parts, outer={some: parts.outer[some].double()}), r"torch\.float64"),
        "missing": (dataclasses.replace(parts, frozen=dict([*parts.frozen.items()][1:])), "has no tensor"),
        "more": (dataclasses.replace(parts, frozen={**parts.frozen, "x": torch.ones(1)}), "has a tensor 'x'"),
        "two dtypes": (
            dataclasses.replace(parts, frozen={**parts.frozen, "x": torch.ones(1).half()}),
            "dtypes F16, F32; bring them to one",
        ),
        "depth": (dataclasses.replace(parts, depth=4), r"middle has 3 items"),
        "fingerprint": (dataclasses.replace(parts, fingerprint="x"), r"base\.fingerprint"),
        "split": (dataclasses.replace(parts, split=Split(0, 2)), "middle"),
    }


@pytest.mark.parametrize("kind", [*broken_contents()])
def test_contents_that_do_not_fit_leave_nothing_behind(tmp_path, kind):
    parts, words = broken_contents()[kind]
    with pytest.raises(KitError, match=words):
        write_kit(tmp_path / "kit", parts)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("at", range(9))
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, at):
    """The disk is full at the first, second, … of all writes."""
    from pathlib import Path

    writes = []

    def limited(write, error):
        def wrapped(*args, **options):
            writes.append(1)
            if len(writes) > at:
                raise error
            return write(*args, **options)

        return wrapped

    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(tensors, "save_file", limited(tensors.save_file, full))
    monkeypatch.setattr(Path, "write_bytes", limited(Path.write_bytes, full))
    if at < 7:  # two tensor files, config, three of the tokenizer, manifest
        with pytest.raises(KitError, match="No space left on device"):
            write_kit(tmp_path / "kit", contents())
        assert [*tmp_path.iterdir()] == []
    else:
        assert write_kit(tmp_path / "kit", contents())
        assert len(writes) == 7


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(kit_module, "dump_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_kit(tmp_path / "kit", contents())
    assert [*tmp_path.iterdir()] == []


def test_a_folder_in_use_is_not_touched(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ModelError, match="not empty"):
        write_kit(folder, contents())
    with pytest.raises(InputError):
        write_kit(folder / "config.json", contents())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    assert write_kit(tmp_path / "empty", contents()).path == tmp_path / "empty"
    assert read_kit(write_kit(tmp_path / "a" / "b", contents()).path)
