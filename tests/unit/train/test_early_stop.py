"""Early stopping: when it stops, what is kept, and how it goes on."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.tiny_run import lines, recipe
from support.trainers import At, stop
from transformers import TrainerCallback, TrainerState

from siftune.base.errors import RecipeError
from siftune.train.callbacks import EarlyStop, evaluations_since_best
from siftune.train.run import train

QUIET = Console(quiet=True)


class Losses(TrainerCallback):
    """Has evaluations find the losses that a test wants."""

    def __init__(self, by_step):
        self.by_step = by_step

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = state.log_history[-1]["eval_loss"] = self.by_step[state.global_step]


@pytest.fixture
def found(monkeypatch):
    """Set what evaluations find: a callback that stands before those of the run."""

    def set_losses(*losses):
        from siftune.train import run

        told, make = Losses(dict(enumerate(losses, 1))), run.ProgressView
        monkeypatch.setattr(run, "ProgressView", lambda console: _both(told, make(console)))

    return set_losses


def _both(told, view):
    view.on_evaluate = told.on_evaluate
    return view


def settings(**others):
    return {"method": "dense", "steps": 8, "eval_every": 1, "patience": 2, **others}


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("losses", "since"), [([], 0), ([2.0], 0), ([2.0, 1.0], 0), ([1.0, 2.0], 1), ([3.0, 1.0, 1.0, 2.0], 2)]
)
def test_evaluations_are_counted_from_the_first_of_least_loss(losses, since):
    history = [{"loss": 0.1}, *({"eval_loss": loss} for loss in losses)]
    assert evaluations_since_best(SimpleNamespace(log_history=history)) == since


@pytest.mark.parametrize(("save_every", "adapter"), [(None, {}), (3, {"adapter": "full", "layers": (0, -1)})])
def test_it_stops_after_patience_and_keeps_the_best(base, rows, tmp_path, found, save_every, adapter, caplog):
    caplog.set_level(logging.INFO, "siftune")
    found(3.0, 2.0, 2.5, 2.0)
    done = train(
        recipe(base, rows, tmp_path / "run", eval=str(rows), **settings(save_every=save_every, **adapter)), QUIET
    )
    assert (done.summary["steps"], done.summary["kept_step"], done.summary["eval_loss"]) == (4, 2, 2.0)
    assert "stopped early, at step 4 of 8: no improvement" in caplog.messages
    left = tmp_path / "run" / "adapter"
    best, last = (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" for step in (2, 4))
    name = "tuned_layers.safetensors" if adapter else "adapter_model.safetensors"
    assert_equal(load_file(left / name), load_file(best / name))
    assert not all(
        torch.equal(a, b) for a, b in zip(*(load_file(place / name).values() for place in (left, last)), strict=True)
    )
    state = done.model.state_dict()
    kept = {key: value for key, value in load_file(left / name).items() if key in state}
    assert_equal({key: state[key] for key in kept}, kept)
    assert "4; weights of step 2" in (left / "README.md").read_text()
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line] == [1, 2, 3, 4]


def test_a_run_that_comes_to_its_end_keeps_the_best_as_well(base, rows, tmp_path, found):
    found(3.0, 1.0, 2.0)
    done = train(recipe(base, rows, tmp_path / "run", eval=str(rows), **settings(steps=3)), QUIET)
    assert (done.summary["steps"], done.summary["kept_step"]) == (3, 2)


def test_it_counts_on_where_a_run_goes_on(base, rows, tmp_path, found, interfere):
    found(2.0, 3.0, 3.0, 3.0, 3.0, 3.0)
    given = settings(patience=3, save_every=1)
    with pytest.MonkeyPatch.context() as patch:
        from siftune.train.trainer import SiftTrainer

        patch.setattr(SiftTrainer, "__init__", SiftTrainer.__init__)
        interfere(At("on_step_begin", 4, stop))
        with pytest.raises(KeyboardInterrupt):
            train(recipe(base, rows, tmp_path / "run", eval=str(rows), **given), QUIET)
    done = train(recipe(base, rows, tmp_path / "run", eval=str(rows), resume=True, **given), QUIET)
    assert (done.summary["steps"], done.summary["kept_step"]) == (4, 1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match="3 evaluations in a row"):
        train(recipe(base, rows, tmp_path / "run", eval=str(rows), resume=True, **given), QUIET)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    more = {**given, "patience": 5, "resume": True}
    done = train(recipe(base, rows, tmp_path / "run", eval=str(rows), **more), QUIET)
    assert (done.summary["steps"], done.summary["kept_step"]) == (6, 1)


def test_a_best_that_is_gone_is_told(base, rows, tmp_path, found, interfere, caplog):
    found(1.0, 2.0, 3.0)

    class Lose(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                (tmp_path / "run" / "checkpoints" / "checkpoint-1" / "trainer_state.json").unlink()

    interfere(Lose())
    done = train(recipe(base, rows, tmp_path / "run", eval=str(rows), **settings()), QUIET)
    assert "kept_step" not in done.summary
    assert done.summary["eval_loss"] == 3.0
    assert "checkpoint-1, is not there" in caplog.text


@pytest.mark.parametrize(
    ("by_steps", "evaluations", "told"), [(True, 3, True), (True, 4, False), (False, 1, True), (False, 4, False)]
)
def test_too_few_evaluations_are_told_of(caplog, by_steps, evaluations, told):
    args = SimpleNamespace(load_best_model_at_end=False, eval_strategy="steps" if by_steps else "epoch")
    state = TrainerState(max_steps=10, num_train_epochs=evaluations)
    state.eval_steps = math.ceil(10 / evaluations)
    EarlyStop(2).on_train_begin(args, state, None)
    assert ("patience 2 cannot stop this run" in caplog.text) == told
    assert args.load_best_model_at_end


def test_a_moved_run_keeps_its_best(base, rows, tmp_path, found, interfere, monkeypatch, caplog):
    found(3.0, 1.0, 2.0, 2.0)
    with pytest.MonkeyPatch.context() as patch:
        from siftune.train.trainer import SiftTrainer

        patch.setattr(SiftTrainer, "__init__", SiftTrainer.__init__)
        interfere(At("on_step_begin", 4, stop))
        monkeypatch.chdir(tmp_path)
        given = {"eval": str(rows), **settings(steps=4, patience=3, save_every=1)}
        with pytest.raises(KeyboardInterrupt):
            train(recipe(base, rows, "run", **given), QUIET)
    (tmp_path / "run").rename(tmp_path / "moved")
    library = logging.getLogger("transformers.trainer")
    library.addHandler(caplog.handler)
    try:
        done = train(recipe(base, rows, "moved", resume=True, **given), QUIET)
    finally:
        library.removeHandler(caplog.handler)
    assert (done.summary["steps"], done.summary.get("kept_step")) == (4, 2)
    assert "does not exist" not in caplog.text
