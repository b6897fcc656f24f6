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


CASES = [
    *((command, "run/run.json") for command in ("eval", "export", "ask", "rows", "report", "resume")),
    *((command, "run/adapter/README.md") for command in ("alone", "export", "continue")),
    ("model", "base/tokenizer.json"), ("base", "base/LICENSE"), ("base", "base/generation_config.json"),
]  # fmt: skip
COMMANDS = {
    "eval": ("eval", "{run}", "--data", "{rows}"),
    "export": ("export", "{run}", "--out", "{out}"),
    "ask": ("ask", "{run}", "Hi"),
    "rows": ("rows", "{run}"),
    "report": ("report", "{run}", "-o", "{out}"),
    "resume": ("train", "--resume", "{run}"),
    "continue": ("train", "--from-adapter", "{run}", "--train", "{rows}", "--out", "{out}"),
    "alone": ("eval", "{run}/adapter", "--data", "{rows}"),
    "model": ("eval", "{base}", "--data", "{rows}"),
    "base": ("export", "{run}", "--base", "{base}", "--out", "{out}"),
}


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize(("command", "name"), CASES)
def test_every_command_refuses_them(trained, tmp_path, capsys, command, name, kind):
    copy = shutil.copytree(trained, tmp_path / "copy")
    (tmp_path / "elsewhere").write_text("secret")
    path = copy / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "elsewhere")
    places = {"run": copy / "run", "base": copy / "base", "rows": copy / "rows.jsonl", "out": copy / "out"}
    message = error_of(capsys, *(word.format(**places) for word in COMMANDS[command]))
    assert message.startswith(f"{path} is ")
    assert "secret" not in message
    assert not (copy / "out").exists()
