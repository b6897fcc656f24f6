"""Damaged run folders, given to commands of which test_changed_folders.py does not try them.

Each is refused with exit code 2 and a sentence that names the file, and nothing is written.
"""

import json
import shutil

import pytest
import yaml
from support.tiny_run import save_rows

from siftune.cli.main import main

EXPORT = ["export", "{run}", "--out", "{out}/merged"]
EVAL = ["eval", "{run}", "--limit", "2", "--metrics", "perplexity"]
RECIPE = ["train", "{run}/recipe.yaml", "--dry-run", "--out", "{out}/new"]


@pytest.fixture(scope="module")
def place(base, tmp_path_factory):
    """A folder with a run, and beside it a copy: a recipe names its folder, so that runs remain in place."""
    place = tmp_path_factory.mktemp("place")
    rows = save_rows(place / "rows.jsonl", 16)
    given = ["--train", rows, "--eval", rows, "--template", "none", "--rank", "2", "--model", base, "--steps", "2"]
    assert main(["train", *map(str, given), "--batch-size", "4", "--out", str(place / "run")]) == 0
    shutil.copytree(place / "run", place / "sound")
    return place


def spoil(run, file, value):
    """Replace a file by bytes, a folder or nothing, or change keys of its JSON or YAML."""
    path = run / file
    data = path.read_bytes()
    path.unlink()
    if value == "folder":
        path.mkdir()
    elif isinstance(value, bytes):
        path.write_bytes(value)
    elif callable(value):
        path.write_bytes(value(data))
    elif isinstance(value, dict):
        path.write_text(json.dumps(yaml.safe_load(data) | value))  # JSON is YAML


CASES = [
    (RECIPE, "recipe.yaml", None),
    (RECIPE, "recipe.yaml", "folder"),
    (RECIPE, "recipe.yaml", b"\xff\xfe"),
    (RECIPE, "recipe.yaml", b"[" * 50_000),
    (RECIPE, "recipe.yaml", b"- 1\n"),
    (RECIPE, "recipe.yaml", lambda data: data[: len(data) // 3] + b"\0"),
    (RECIPE, "recipe.yaml", {"rank": True}),
    (RECIPE, "recipe.yaml", {"lr": "1e999"}),
    (RECIPE, "recipe.yaml", {"train": {"a": 1}}),
    (RECIPE, "recipe.yaml", {"model": ["../x"]}),
    (RECIPE, "recipe.yaml", {"x": 1}),
    (EXPORT, "recipe.yaml", "folder"),
    (EXPORT, "recipe.yaml", b"null"),
    (EXPORT, "adapter/adapter_config.json", None),
    (EXPORT, "adapter/adapter_config.json", b"{}"),
    (EXPORT, "adapter/adapter_config.json", {"r": "2"}),
    (EXPORT, "adapter/adapter_config.json", {"target_modules": "(a+)+$"}),
    (EXPORT, "adapter/adapter_config.json", {"peft_type": "../x"}),
    (EXPORT, "adapter/adapter_model.safetensors", None),
    (EXPORT, "adapter/adapter_model.safetensors", b""),
    (EXPORT, "adapter/adapter_model.safetensors", lambda data: data[:-1]),
    (EVAL, "recipe.yaml", {"template": 3}),
    (EVAL, "adapter/adapter_config.json", {"r": 10**9}),
]


@pytest.mark.parametrize(("command", "file", "value"), CASES)
def test_a_damaged_run_is_refused(place, tmp_path, capsys, command, file, value):
    shutil.rmtree(place / "run")
    shutil.copytree(place / "sound", place / "run")
    spoil(place / "run", file, value)
    capsys.readouterr()
    code = main([word.format(run=place / "run", out=tmp_path) for word in command])
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2, error
    assert error.startswith("siftune: error: ")
    assert file.split("/")[0] in error
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", [EXPORT, EVAL, RECIPE])
def test_the_sound_run_works(place, tmp_path, command):
    shutil.rmtree(place / "run")
    shutil.copytree(place / "sound", place / "run")
    assert main([word.format(run=place / "run", out=tmp_path) for word in command]) == 0
