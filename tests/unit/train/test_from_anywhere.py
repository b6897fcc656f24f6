"""Runs hold wherever they are looked at from, and a start that fails leaves nothing behind."""

import json
import shutil

import pytest
from rich.console import Console
from support.tiny_run import recipe
from support.trainers import At, stop

from siftune.base.errors import InputError
from siftune.cli.main import main
from siftune.recipe.read import anchored, load_recipe
from siftune.recipe.schema import Recipe
from siftune.train.folder.weights import read_about
from siftune.train.run import train

QUIET = Console(quiet=True)


def test_what_is_there_is_named_in_full_and_other_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "smollm2"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.jsonl").write_text("")
    given = Recipe(model="base", train="a.jsonl", eval="owner/name", drop_rows="none.jsonl", out="runs/x")
    found = anchored(given)
    assert (found.model, found.train) == (f"{tmp_path}/base", f"{tmp_path}/a.jsonl")
    assert (found.eval, found.drop_rows, found.target) == ("owner/name", "none.jsonl", None)
    assert found.out == f"{tmp_path}/runs/x"
    assert anchored(Recipe(model="smollm2")).model == "smollm2"  # that name is the packaged model's
    assert anchored(found) == found


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_goes_on_and_is_measured_from_another_folder(base, rows, tmp_path, monkeypatch, capsys, adapter):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    shutil.copytree(base, here / "base")
    shutil.copy(rows, here / "rows.jsonl")
    monkeypatch.chdir(here)
    settings = {"adapter": adapter, **({"layers": (0, -1)} if adapter == "full" else {}), "method": "dense"}
    train(recipe("base", "rows.jsonl", "run", eval="rows.jsonl", steps=2, **settings), QUIET)
    written = load_recipe(here / "run" / "recipe.yaml")
    assert {written.model, written.train, written.eval} == {f"{here}/base", f"{here}/rows.jsonl"}
    if adapter == "full":
        assert read_about(here / "run" / "adapter").base == f"{here}/base"
    else:
        config = json.loads((here / "run" / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == f"{here}/base"
    monkeypatch.chdir(there)
    run, quick = str(here / "run"), ["--metrics", "perplexity", "--limit", "2"]
    assert main(["train", "--resume", run, "--steps", "3"]) == 0
    for name in (run, f"{run}/adapter"):
        assert main(["eval", name, *quick, "--data", f"{here}/rows.jsonl"]) == 0
    shutil.move(here / "base", there / "moved")
    capsys.readouterr()
    assert main(["eval", run, *quick]) == 2
    assert f"was trained on {here}/base, which is not there" in capsys.readouterr().err
    for name in (run, f"{run}/adapter"):
        assert main(["eval", name, *quick, "--base", "moved", "--data", f"{here}/rows.jsonl"]) == 0
    assert main(["export", run, "--base", "moved", "--out", "merged"]) == 0
    assert list((there).glob("runs")) == []


# --- starts that fail


@pytest.mark.parametrize(
    "change",
    [
        {"train": "none.jsonl"},
        {"model": "/none"},
        {"targets": ("nothing_proj",)},
        {"resume": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_it_leaves_no_folder(base, rows, tmp_path, change):
    given = recipe(base, rows, tmp_path / "runs" / "first")
    for name, value in change.items():
        setattr(given, name, value)
    with pytest.raises(InputError):
        train(given, QUIET)
    assert not (tmp_path / "runs").exists()


def test_an_end_before_the_first_step_leaves_what_was_there(base, rows, tmp_path, interfere):
    out = tmp_path / "runs" / "first"
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    (out / "recipe.yaml").write_text("method: dense\n")
    interfere(At("on_pre_optimizer_step", 1, stop))
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(recipe(base, rows, out), QUIET)
    assert {path.name for path in out.iterdir()} == {"notes.txt", "recipe.yaml"}
    assert stopped.value.__notes__ == ["no step was finished"]
