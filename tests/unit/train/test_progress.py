"""What a user sees of a run: plain lines, or a bar on a terminal."""

import io
import re

import pytest
from rich.console import Console
from support.tiny_run import lines, recipe
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from siftune.train import callbacks
from siftune.train.callbacks import Metrics, ProgressView, describe
from siftune.train.folder.run import RunFolder
from siftune.train.run import train
from siftune.train.trainer import SiftTrainer


def state(step, tokens=0, **settings):
    return TrainerState(global_step=step, max_steps=10, num_input_tokens_seen=tokens, **settings)


def send(callback, event, at, logs=None):
    arguments = TrainingArguments(output_dir="unused", use_cpu=True)
    getattr(callback, event)(arguments, at, TrainerControl(), **({} if logs is None else {"logs": logs}))
    return logs


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    return clock


def test_speed_is_measured_from_log_to_log(tmp_path, clock):
    metrics = Metrics(RunFolder(tmp_path), lambda: 7)
    send(metrics, "on_train_begin", state(0))
    clock.now += 4
    first = send(metrics, "on_log", state(2, tokens=200), {"loss": 2.0})
    assert (first["tokens_per_second"], first["seconds_per_step"], first["active_layers"]) == (50.0, 2.0, 7)
    clock.now += 1
    second = send(metrics, "on_log", state(4, tokens=300), {"loss": 1.0})
    assert (second["tokens_per_second"], second["seconds_per_step"]) == (100.0, 0.5)
    assert second["peak_memory_mb"] > 10
    clock.now += 50
    assert send(metrics, "on_log", state(4, tokens=300), {"eval_loss": 1.5}) == {"eval_loss": 1.5}
    written = lines(tmp_path / "metrics.jsonl")
    assert written == [{"step": 2, **first}, {"step": 4, **second}, {"step": 4, "eval_loss": 1.5}]


def test_a_resumed_run_counts_from_where_it_goes_on(tmp_path, clock):
    metrics = Metrics(RunFolder(tmp_path), lambda: 1)
    send(metrics, "on_train_begin", state(6, tokens=1000))
    clock.now += 2
    assert send(metrics, "on_log", state(8, tokens=1100), {"loss": 2.0})["tokens_per_second"] == 50.0


def test_other_ranks_write_nothing(tmp_path, clock):
    output = io.StringIO()
    metrics, view = Metrics(RunFolder(tmp_path), lambda: 1), ProgressView(Console(file=output))
    other = state(1, is_world_process_zero=False)
    for callback in (metrics, view):
        send(callback, "on_train_begin", other)
        send(callback, "on_log", other, {"loss": 1.0})
    assert output.getvalue() == ""
    assert not (tmp_path / "metrics.jsonl").exists()


FIGURES = {"loss": 1.23456, "tokens_per_second": 12345.6, "peak_memory_mb": 2048.4, "active_layers": 7}


def test_the_figures_in_words():
    assert describe(FIGURES) == "loss 1.2346  12,346 tokens/s  peak 2,048 MB  7 layers active"
    assert describe({**FIGURES, "active_layers": 1}).endswith("  1 layer active")
    assert describe({"loss": "1.5"}) == "loss 1.5000"


def test_plain_lines_without_a_terminal(clock):
    output = io.StringIO()
    view = ProgressView(Console(file=output, width=200))
    send(view, "on_train_begin", state(4))
    clock.now += 6
    send(view, "on_step_end", state(6))
    send(view, "on_log", state(6), dict(FIGURES))
    send(view, "on_log", state(6), {"eval_loss": 1.0})
    send(view, "on_train_end", state(10))
    # two of the six steps that are left took six seconds
    assert output.getvalue() == f"step 6/10  {describe(FIGURES)}  12 s left\nstep 6/10  held-out loss 1.0000\n"


def test_a_bar_on_a_terminal():
    output = io.StringIO()
    view = ProgressView(Console(file=output, force_terminal=True, width=160, color_system=None))
    send(view, "on_train_begin", state(0))
    for step in range(1, 11):
        send(view, "on_step_end", state(step))
        send(view, "on_log", state(step), {"eval_loss": 0.25})
        send(view, "on_log", state(step), dict(FIGURES))
    view.close()
    view.close()
    text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", output.getvalue())
    assert "10/10" in text
    assert "loss 1.2346" in text
    assert "held-out loss 0.2500" in text
    assert re.search(r"\d:\d\d:\d\d left", text)


def test_runs_on_a_terminal_and_elsewhere(base, rows, tmp_path):
    terminal, file = io.StringIO(), io.StringIO()
    train(recipe(base, rows, tmp_path / "a"), Console(file=terminal, force_terminal=True, width=160))
    train(recipe(base, rows, tmp_path / "b", log_every=4), Console(file=file, width=300))
    assert "6/6" in terminal.getvalue()
    assert terminal.getvalue().endswith("\n\x1b[?25h")  # the cursor is shown again
    seen = file.getvalue().splitlines()
    assert "24 rows to train on" in seen[1]
    assert [line.split()[1] for line in seen[3:]] == ["1/6", "4/6", "6/6"]  # the last one in any case
    pattern = r"step \d/6  loss \d\.\d{4}  [\d,]+ tokens/s  peak [\d,]+ MB  2 layers active  \d+ s left"
    assert all(re.fullmatch(pattern, line) for line in seen[3:]), seen


def test_the_bar_is_taken_down_when_training_fails(base, rows, tmp_path, monkeypatch):
    class Stop(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyboardInterrupt

    monkeypatch.setattr("siftune.train.build.PrinterCallback", Stop)  # in the place of one that is only taken off
    monkeypatch.setattr(SiftTrainer, "remove_callback", lambda self, kind: self.add_callback(Stop()))
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(base, rows, tmp_path / "run"), console)
    assert not console._live_stack


def test_compiling_is_told_and_not_counted_in_the_speed(tmp_path, clock):
    spent = [0.0]
    metrics = Metrics(RunFolder(tmp_path), lambda: 7, lambda: spent[0])
    send(metrics, "on_train_begin", state(0))
    clock.now += 34
    spent[0] = 30.0
    first = send(metrics, "on_log", state(2, tokens=200), {"loss": 2.0})
    assert (first["tokens_per_second"], first["seconds_per_step"], first["compile_seconds"]) == (50.0, 2.0, 30.0)
    assert describe(first).endswith("  30 s compiling")
    clock.now += 4
    second = send(metrics, "on_log", state(4, tokens=400), {"loss": 2.0})
    assert second["tokens_per_second"] == 50.0
    assert "compile_seconds" not in second
