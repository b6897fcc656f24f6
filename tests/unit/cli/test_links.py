"""Links and pipes in run folders, adapters and models: every command refuses them, and none waits for a pipe."""

import os
import shutil

import pytest
from rich.console import Console
from support.commands import error_of
from support.tiny_run import recipe, save_rows

from siftune.train.run import train


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A folder with a run, its base model and its rows."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(base, place / "base")
    settings = {"method": "dense", "steps": 1, "save_every": 1}
    train(recipe(place / "base", save_rows(place / "rows.jsonl", 8), place / "run", **settings), Console(quiet=True))
    return place


COMMANDS = {
    "eval": ("eval", "{run}", "--data", "{rows}"),
    "export": ("export", "{run}", "--out", "{out}"),
    "ask": ("ask", "{run}", "Hi"),
    "rows": ("rows", "{run}"),
    "report": ("report", "{run}", "-o", "{out}"),
    "train --resume": ("train", "--resume", "{run}"),
    "train --from-adapter": ("train", "--from-adapter", "{run}", "--train", "{rows}", "--out", "{out}"),
}


def spoil(path, kind, elsewhere):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(elsewhere)


def refusal(capsys, command, place, run):
    words = [word.format(run=run, rows=place / "rows.jsonl", out=place / "out") for word in COMMANDS[command]]
    message = error_of(capsys, *words)
    assert "secret" not in message
    assert not (place / "out").exists()
    return message


@pytest.fixture
def copy(trained, tmp_path):
    (tmp_path / "elsewhere").write_text("secret")
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", ["recipe.yaml", "run.json", "metrics.jsonl", "adapter/adapter_config.json"])
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train --from-adapter"])
def test_a_run_folder(copy, capsys, command, name, kind):
    path = copy / "run" / name
    spoil(path, kind, copy.parent / "elsewhere")
    message = refusal(capsys, command, copy, copy / "run")
    assert message.startswith(f"{path} is ") or (name, kind) == ("recipe.yaml", "pipe")  # then it is no run folder


@pytest.mark.parametrize("name", ["bad_rows.txt", "eval.json"])
@pytest.mark.parametrize("command", ["rows", "report"])
def test_files_that_a_run_folder_need_not_have(copy, capsys, command, name):
    path = copy / "run" / name
    spoil(path, "link", copy.parent / "elsewhere")
    assert refusal(capsys, command, copy, copy / "run").startswith(f"{path} is ")


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", ["README.md", "chat_template.jinja", "adapter_model.safetensors"])
@pytest.mark.parametrize("command", ["eval", "export", "ask", "train --from-adapter"])
def test_an_adapter(copy, capsys, command, name, kind):
    path = copy / "run" / "adapter" / name
    if kind == "link" and name == "adapter_model.safetensors":
        pytest.skip("weights may be on another disk")
    spoil(path, kind, copy.parent / "elsewhere")
    assert refusal(capsys, command, copy, copy / "run" / "adapter").startswith(f"{path} is ")


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("command", ["eval", "ask"])
def test_a_model(copy, capsys, command, name, kind):
    path = copy / "base" / name
    spoil(path, kind, copy.parent / "elsewhere")
    assert refusal(capsys, command, copy, copy / "base").startswith(f"{path} is ")
