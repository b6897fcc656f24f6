"""Checkpoints that nobody asked for: when they are made, what is kept, and a run that is done."""

import json
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.tiny_run import recipe
from transformers import TrainerCallback

from siftune.errors import RecipeError
from siftune.trainer import checkpoints
from siftune.trainer.run import train

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
    monkeypatch.setattr("siftune.trainer.build.PrinterCallback", Saves)
    from siftune.trainer.trainer import SiftTrainer

    monkeypatch.setattr(SiftTrainer, "remove_callback", lambda self, kind: kind is Saves and self.add_callback(noted))
    return noted


def kept(folder):
    return sorted(int(path.name.split("-")[1]) for path in (folder / "checkpoints").iterdir())


def test_every_tenth_and_the_end_of_which_the_last_two_stay(base, rows, tmp_path, saves, monkeypatch):
    monkeypatch.setattr(checkpoints, "_LEAST", 1)
    train(recipe(base, rows, tmp_path / "run", method="dense", steps=25), QUIET)
    assert saves.steps == [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert kept(tmp_path / "run") == [24, 25]


def test_short_runs_are_saved_at_their_end(base, rows, tmp_path, saves):
    train(recipe(base, rows, tmp_path / "run", method="dense", steps=12), QUIET)
    assert saves.steps == [10, 12]


def test_a_quarter_of_an_hour_is_the_most_that_is_lost(base, rows, tmp_path, saves, monkeypatch):
    times = iter(range(0, 100_000, 400))
    clock = SimpleNamespace(monotonic=lambda: float(next(times)))  # looked at once a step, and when one is saved
    monkeypatch.setattr(checkpoints, "time", clock)
    train(recipe(base, rows, tmp_path / "run", method="dense", steps=8), QUIET)
    assert saves.steps == [3, 6, 8]


def test_the_best_stays(base, rows, tmp_path, saves):
    settings = {"method": "dense", "steps": 8, "eval": str(rows), "eval_limit": 4, "eval_every": 1, "lr": 0.5}
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
