"""Metrics, progress, regular checkpoints and early stopping."""

import io
import json
import logging
import math
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.tiny_run import lines, recipe
from support.trainers import At, stop
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.base.errors import RecipeError
from siftune.train import callbacks
from siftune.train.callbacks import (
    EarlyStop,
    Metrics,
    ProgressView,
    RegularCheckpoints,
    describe,
    evaluations_since_best,
)
from siftune.train.folder.run_folder import RunFolder
from siftune.train.guards import flags
from siftune.train.run import train
from siftune.train.trainer import SiftTrainer

QUIET = Console(quiet=True)
LOG = {"loss": 1.23456, "tokens_per_second": 12345.6, "peak_memory_mb": 2048.4, "active_layers": 7}


def state(step, tokens=0, **settings):
    return TrainerState(global_step=step, num_input_tokens_seen=tokens, **{"max_steps": 10, **settings})


def send(callback, event, at, logs=None):
    arguments = TrainingArguments(output_dir="unused", use_cpu=True)
    control = TrainerControl()
    getattr(callback, event)(arguments, at, control, **({} if logs is None else {"logs": logs}))
    return control if logs is None else logs


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(callbacks, "time", clock)
    return clock


# --- metrics and progress ---


def test_speed_is_that_of_steps_alone(tmp_path, clock):
    compiling = [0.0]
    metrics = Metrics(RunFolder(tmp_path), lambda: 7, lambda: compiling[0])
    clock.now += 20
    send(metrics, "on_step_end", state(5, tokens=900))
    clock.now += 2
    send(metrics, "on_step_end", state(6, tokens=900))
    resumed = send(metrics, "on_log", state(6, tokens=1000), {"loss": 2.5})  # tokens are counted with a line
    assert {"loss", "peak_memory_mb", "active_layers"} == set(resumed)
    clock.now += 32
    compiling[0] = 30.0
    send(metrics, "on_step_end", state(7, tokens=1000))
    clock.now += 2
    send(metrics, "on_step_end", state(8, tokens=1000))
    first = send(metrics, "on_log", state(8, tokens=1200), {"loss": 2.0})
    assert (first["tokens_per_second"], first["seconds_per_step"], first["compile_seconds"]) == (50.0, 2.0, 30.0)
    assert (first["active_layers"], first["peak_memory_mb"] > 10) == (7, True)
    assert describe(first).endswith("  30 s compiling")
    clock.now += 50  # an evaluation
    assert send(metrics, "on_log", state(8, tokens=1200), {"eval_loss": 1.5}) == {"eval_loss": 1.5}
    send(metrics, "on_evaluate", state(8))
    clock.now += 70
    send(metrics, "on_save", state(8))
    clock.now += 1
    send(metrics, "on_step_end", state(10, tokens=1300))
    second = send(metrics, "on_log", state(10, tokens=1300), {"loss": 1.0})
    assert (second["tokens_per_second"], second["seconds_per_step"]) == (100.0, 0.5)
    written = lines(tmp_path / "metrics.jsonl")
    expected = [{"step": 6, **resumed}, {"step": 8, **first}, {"step": 8, "eval_loss": 1.5}, {"step": 10, **second}]
    assert written == expected


def test_other_ranks_write_nothing(tmp_path, clock):
    output = io.StringIO()
    for callback in (Metrics(RunFolder(tmp_path), lambda: 1), ProgressView(Console(file=output))):
        send(callback, "on_train_begin", state(1, is_world_process_zero=False))
        send(callback, "on_log", state(1, is_world_process_zero=False), {"loss": 1.0})
    assert output.getvalue() == ""
    assert not (tmp_path / "metrics.jsonl").exists()


def test_plain_lines_without_a_terminal(clock):
    output = io.StringIO()
    view = ProgressView(Console(file=output, width=200))
    send(view, "on_train_begin", state(3))
    clock.now += 60
    send(view, "on_step_end", state(4))
    send(view, "on_log", state(4), {"loss": 3.0})
    clock.now += 6
    send(view, "on_step_end", state(6))
    send(view, "on_log", state(6), dict(LOG))
    send(view, "on_log", state(6), {"eval_loss": 1.0, "eval_loss/[/web]": 2.0})
    send(view, "on_train_end", state(10))
    log = "loss 1.2346  12,346 tokens/s  peak 2,048 MB  7 layers active"
    # two of the six remaining steps took six seconds
    assert output.getvalue().splitlines() == [
        "step 4/10  loss 3.0000", f"step 6/10  {log}  12 s left", "step 6/10  held-out loss 1.0000 ([/web] 2.0000)",
    ]  # fmt: skip


def test_without_a_terminal_there_is_a_line_in_ten_seconds(clock):
    output = io.StringIO()
    view = ProgressView(Console(file=output, width=200))
    long = {"max_steps": 100}
    for step in range(1, 9):
        clock.now += 4
        send(view, "on_step_end", state(step, **long))
    send(view, "on_log", state(8, **long), {"loss": 3.0})
    clock.now += 4
    send(view, "on_step_end", state(9, **long))
    send(view, "on_step_end", state(10, is_world_process_zero=False, **long))
    assert output.getvalue().splitlines() == [
        "step 2/100  6 min 32 s left", "step 5/100  6 min 20 s left", "step 8/100  6 min 8 s left",
        "step 8/100  loss 3.0000  6 min 8 s left",
    ]  # fmt: skip


def test_a_bar_on_a_terminal():
    output = io.StringIO()
    view = ProgressView(Console(file=output, force_terminal=True, width=160, color_system=None))
    send(view, "on_train_begin", state(0))
    for step in range(1, 11):
        send(view, "on_step_end", state(step))
        send(view, "on_log", state(step), {"eval_loss": 0.25, "eval_loss/[/web]": 0.5})
        send(view, "on_log", state(step), dict(LOG))
    view.close()
    view.close()
    text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", output.getvalue())
    assert "10/10" in text
    assert "loss 1.2346" in text
    assert "held-out loss 0.2500 ([/web] 0.5000)" in text
    assert re.search(r"\d:\d\d:\d\d left", text)


def test_the_screen_of_a_run(base, rows, tmp_path, interfere):
    file = io.StringIO()
    train(recipe(base, rows, tmp_path / "b", log_every=4), Console(file=file, width=300))
    summary, steps = file.getvalue().splitlines()[:3], file.getvalue().splitlines()[3:]
    assert "24 rows to train on" in summary[1]
    assert [line.split()[1] for line in steps] == ["1/6", "4/6", "6/6"]  # the last one in any case
    terminal = Console(file=io.StringIO(), force_terminal=True, width=160)
    interfere(At("on_step_begin", 2, stop))
    with pytest.raises(KeyboardInterrupt):
        train(recipe(base, rows, tmp_path / "run"), terminal)
    assert not terminal._live_stack
    assert terminal.file.getvalue().endswith("\n\x1b[?25h")  # the cursor is shown again


# --- regular checkpoints ---


def test_the_interval_of_regular_checkpoints():
    for steps, every in ((12, 10), (250, 25), (255, 26)):
        at = state(0, max_steps=steps)
        send(RegularCheckpoints(), "on_train_begin", at)
        assert at.save_steps == every


def test_a_checkpoint_after_a_quarter_of_an_hour_on_any_rank(clock, monkeypatch):
    saver, others = RegularCheckpoints(), [False, False, False, True, False, False]
    monkeypatch.setattr(flags, "world_size", lambda: 2)
    send(saver, "on_train_begin", state(0))
    saved = []
    for step, other in enumerate(others, 1):
        clock.now += 400
        saver.flag.agreed = other or saver.flag.condition()  # as `exchange` does
        if send(saver, "on_step_end", state(step)).should_save:
            saved.append(step)
            send(saver, "on_save", state(step))
    assert saved == [3, 4]  # by this rank's clock, then by another's


def test_the_last_two_and_the_best_are_kept(base, rows, tmp_path):
    settings = {"method": "dense", "steps": 8, "eval": str(rows), "eval_every": 1, "lr": 0.5}
    train(recipe(base, rows, tmp_path / "run", **settings), QUIET)
    checkpoints = tmp_path / "run" / "checkpoints"
    state = json.loads((checkpoints / "checkpoint-8" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    lower = [step for step in losses if all(losses[step] < losses[other] for other in losses if other < step)]
    assert state["best_global_step"] == best
    kept = {int(path.name.split("-")[1]) for path in checkpoints.iterdir()}
    assert kept == {best, *sorted({*lower, 8})[-2:]}


# --- early stopping ---


class Losses(TrainerCallback):
    """Replaces the losses of evaluations."""

    def __init__(self, by_step):
        self.by_step = by_step

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = state.log_history[-1]["eval_loss"] = self.by_step[state.global_step]


@pytest.fixture
def losses(monkeypatch):
    """Set the losses of evaluations: by a callback that precedes those of the run."""

    def set_losses(*values):
        from siftune.train import run

        make, replaced = run.ProgressView, Losses(dict(enumerate(values, 1)))

        def view(console):
            made = make(console)
            made.on_evaluate = replaced.on_evaluate
            return made

        monkeypatch.setattr(run, "ProgressView", view)

    return set_losses


def settings(**others):
    return {"method": "dense", "steps": 8, "eval_every": 1, "patience": 2, **others}


@pytest.mark.parametrize(
    ("values", "since"),
    [
        ([], 0),
        ([2.0], 0),
        ([2.0, 1.0], 0),
        ([1.0, 2.0], 1),
        ([3.0, 1.0, 1.0, 2.0], 2),
        ([math.nan, 2.0], 0),
        ([1.0, math.nan], 1),
        ([math.nan, math.nan], 1),
    ],
)
def test_evaluations_are_counted_from_the_first_of_least_loss(values, since):
    history = [{"loss": 0.1}, *({"eval_loss": value} for value in values)]
    assert evaluations_since_best(SimpleNamespace(log_history=history)) == since


@pytest.mark.parametrize(("save_every", "adapter"), [(None, {}), (3, {"adapter": "full", "layers": (0, -1)})])
def test_it_stops_after_patience_and_keeps_the_best(base, rows, tmp_path, losses, save_every, adapter, caplog):
    caplog.set_level(logging.INFO, "siftune")
    losses(3.0, 2.0, 2.5, 2.0)
    given = recipe(base, rows, tmp_path / "run", eval=str(rows), **settings(save_every=save_every, **adapter))
    done = train(given, QUIET)
    assert (done.summary["steps"], done.summary["kept_step"], done.summary["eval_loss"]) == (4, 2, 2.0)
    assert "stopped early, at step 4 of 8" in caplog.text
    run = tmp_path / "run"
    name = "tuned_layers.safetensors" if adapter else "adapter_model.safetensors"
    best, last = (load_file(run / "checkpoints" / f"checkpoint-{step}" / name) for step in (2, 4))
    ours = load_file(run / "adapter" / name)
    assert all(torch.equal(ours[key], best[key]) for key in best)
    assert not all(torch.equal(ours[key], last[key]) for key in best)
    model = done.model.state_dict()
    assert all(torch.equal(model[key], value) for key, value in ours.items() if key in model)
    assert "4; weights of step 2" in (run / "adapter" / "README.md").read_text()


def test_it_continues_to_count_in_a_resumed_run(base, rows, tmp_path, losses, interfere, monkeypatch, caplog):
    losses(2.0, 3.0, 3.0, 3.0, 3.0, 3.0)
    given = settings(patience=3, save_every=1, eval=str(rows))
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiftTrainer, "__init__", SiftTrainer.__init__)
        interfere(At("on_step_begin", 4, stop))
        with pytest.raises(KeyboardInterrupt):
            train(recipe(base, rows, "run", **given), QUIET)
    (tmp_path / "run").rename(tmp_path / "moved")  # with its best checkpoint
    library = logging.getLogger("transformers.trainer")
    library.addHandler(caplog.handler)
    try:
        done = train(recipe(base, rows, "moved", resume=True, **given), QUIET)
    finally:
        library.removeHandler(caplog.handler)
    assert (done.summary["steps"], done.summary["kept_step"]) == (4, 1)
    assert "does not exist" not in caplog.text
    with pytest.raises(RecipeError, match="3 evaluations in a row"):
        train(recipe(base, rows, "moved", resume=True, **given), QUIET)
    done = train(recipe(base, rows, "moved", **{**given, "patience": 5, "resume": True}), QUIET)
    assert (done.summary["steps"], done.summary["kept_step"]) == (6, 1)


def test_a_best_checkpoint_that_is_gone(base, rows, tmp_path, losses, interfere, caplog):
    losses(1.0, 2.0, 3.0)

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
    ("by_steps", "evaluations", "warned"), [(True, 3, True), (True, 4, False), (False, 1, True), (False, 4, False)]
)
def test_too_few_evaluations(caplog, by_steps, evaluations, warned):
    args = SimpleNamespace(load_best_model_at_end=False, eval_strategy="steps" if by_steps else "epoch")
    state = TrainerState(max_steps=10, num_train_epochs=evaluations)
    state.eval_steps = math.ceil(10 / evaluations)
    EarlyStop(2).on_train_begin(args, state, None)
    assert ("patience 2 cannot stop this run" in caplog.text) == warned
    assert args.load_best_model_at_end
