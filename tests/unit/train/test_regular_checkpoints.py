"""Checkpoints that nobody asked for: when they are made, what is kept, and a run that is done."""

import json
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.tiny_run import recipe
from transformers import TrainerCallback

from siftune.base.errors import RecipeError
from siftune.cli.main import main
from siftune.recipe.read import load_recipe
from siftune.train import callbacks
from siftune.train.run import train

QUIET = Console(quiet=True)


class Saves(TrainerCallback):
    """Notes the steps that are saved, and may make time pass."""

    def __init__(self):
        self.steps = []

    def on_save(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


@pytest.fixture
def saves(monkeypatch):
    noted = Saves()
    monkeypatch.setattr("siftune.train.build.PrinterCallback", Saves)
    from siftune.train.trainer import SiftTrainer

    monkeypatch.setattr(SiftTrainer, "remove_callback", lambda self, kind: kind is Saves and self.add_callback(noted))
    return noted


def kept(folder):
    return sorted(int(path.name.split("-")[1]) for path in (folder / "checkpoints").iterdir())


def test_every_tenth_and_the_end_of_which_the_last_two_stay(base, rows, tmp_path, saves, monkeypatch):
    monkeypatch.setattr(callbacks, "_LEAST", 1)
    train(recipe(base, rows, tmp_path / "run", method="dense", steps=25), QUIET)
    assert saves.steps == [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert kept(tmp_path / "run") == [24, 25]


def test_short_runs_are_saved_at_their_end(base, rows, tmp_path, saves):
    train(recipe(base, rows, tmp_path / "run", method="dense", steps=12), QUIET)
    assert saves.steps == [10, 12]


def test_a_quarter_of_an_hour_is_the_most_that_is_lost(base, rows, tmp_path, saves, monkeypatch):
    times = iter(range(0, 100_000, 400))
    clock = SimpleNamespace(monotonic=lambda: float(next(times)))  # looked at once a step, and when one is saved
    monkeypatch.setattr(callbacks, "time", clock)
    train(recipe(base, rows, tmp_path / "run", method="dense", steps=8), QUIET)
    assert saves.steps == [3, 6, 8]


def test_ranks_save_together_where_one_is_late(base, rows, tmp_path, saves, monkeypatch):
    others = iter([False, True, *[False] * 9])  # at the second step the other of two ranks is late
    monkeypatch.setattr(callbacks, "on_any_rank", lambda late, device: late or next(others))
    train(recipe(base, rows, tmp_path / "run", method="dense", steps=4), QUIET)
    assert saves.steps == [2, 4]


def test_the_best_stays(base, rows, tmp_path, saves):
    settings = {"method": "dense", "steps": 8, "eval": str(rows), "eval_every": 1, "lr": 0.5}
    train(recipe(base, rows, tmp_path / "run", **settings), QUIET)
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert state["best_global_step"] == best
    assert set(kept(tmp_path / "run")) == {best, *saves.steps[-2:]}
    lower = [step for step in losses if all(losses[step] < losses[other] for other in losses if other < step)]
    assert set(saves.steps) == {*lower, 8}


def test_a_run_that_is_done_is_left_alone(base, rows, tmp_path):
    given = recipe(base, rows, tmp_path / "run", method="dense", steps=3)
    train(given, QUIET)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = recipe(base, rows, tmp_path / "run", method="dense", steps=3, resume=True)
    with pytest.raises(RecipeError, match=r"checkpoint-3 is the end of its run: all of 3 steps are done"):
        train(again, QUIET)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    more = train(recipe(base, rows, tmp_path / "run", method="dense", steps=4, resume=True), QUIET)
    assert more.summary["steps"] == 4


def test_epochs_that_are_done(base, rows, tmp_path):
    settings = {"method": "dense", "steps": None, "epochs": 0.5, "batch_size": 4, "accumulate": 2}
    done = train(recipe(base, rows, tmp_path / "run", **settings), QUIET)
    with pytest.raises(RecipeError, match=f"all of {done.summary['steps']} steps are done"):
        train(recipe(base, rows, tmp_path / "run", resume=True, **settings), QUIET)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 0.02}, "lr 0.01, this recipe has 0.02"),
        ({"method": "rst"}, "method ist, this recipe has rst"),
        ({"active": 1}, "ist.active 0.5, this recipe has 1"),
        ({"batch_size": 2}, "batch_size 4, this recipe has 2"),
        ({"batch_size": 2, "auto_batch": True}, "batch_size 4, this recipe has 2"),
        ({"limit": 12}, "is of a run on other training rows than"),
    ],
)
def test_another_recipe_or_other_rows_are_refused(base, rows, tmp_path, change, said):
    train(recipe(base, rows, tmp_path / "run", steps=3), QUIET)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match="checkpoint-3 is of a run") as caught:
        train(recipe(base, rows, tmp_path / "run", **{"steps": 4, "resume": True, **change}), QUIET)
    assert said in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_what_is_told_and_measured_may_change(base, rows, tmp_path):
    train(recipe(base, rows, tmp_path / "run", steps=3), QUIET)
    more = {"steps": 4, "resume": True, "eval": str(rows), "log_every": 3, "save_every": 1}
    assert train(recipe(base, rows, tmp_path / "run", **more), QUIET).summary["eval_loss"] is not None


def test_a_run_folder_alone_goes_on_by_its_own_recipe(base, rows, tmp_path, capsys):
    given = ["--model", str(base), "--train", str(rows), "--template", "none", "--rank", "2", "--batch-size", "4"]
    assert main(["train", *given, "--lr", "0.01", "--steps", "3", "--out", str(tmp_path / "run")]) == 0
    for words in (["--resume", str(tmp_path / "run")], [f"--resume={tmp_path}/run"]):
        assert main(["train", *words]) == 2
        assert "all of 3 steps are done" in capsys.readouterr().err
    assert main(["train", "--steps", "4", "--resume", str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["steps"], result["run"]) == (4, str(tmp_path / "run"))
    assert load_recipe(tmp_path / "run" / "recipe.yaml").lr == 0.01
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "5", "--lr", "1"]) == 2
    assert "is of a run with lr 0.01, this recipe has 1.0" in capsys.readouterr().err
