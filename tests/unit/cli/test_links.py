"""Links and pipes in run folders, by which a command could write elsewhere: every command refuses them."""

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


@pytest.mark.parametrize(("name", "kind"), [("metrics.jsonl", "link"), ("adapter/adapter_config.json", "pipe")])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_folder(copy, capsys, command, name, kind):
    path = copy / "run" / name
    spoil(path, kind, copy.parent / "elsewhere")
    assert refusal(capsys, command, copy, copy / "run").startswith(f"{path} is ")
