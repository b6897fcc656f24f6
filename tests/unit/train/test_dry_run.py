"""A run that is not made: what it says is what the run does, and nothing is left behind."""

import json

import numpy as np
import pytest
from rich.console import Console
from support.commands import error_of, siftune
from support.tiny_run import recipe, save_rows

from siftune.train import dry_run as module
from siftune.train.dry_run import _batches, _cost, _saves, _tried_batches, _tries, dry_run
from siftune.train.run import train

QUIET = Console(quiet=True)


def test_what_is_said_is_what_the_run_does(base, rows, tmp_path):
    given = recipe(base, rows, tmp_path / "run", method="rst", eval_share=0.3, max_length=14, bad_rows="stop")
    found = dry_run(given, QUIET)
    assert not (tmp_path / "run").exists()
    told = found.to_dict()
    done = train(given, QUIET)
    assert told["steps"] == done.summary["steps"] == 6
    assert told["trainable"] == sum(p.numel() for p in done.model.parameters() if p.requires_grad)
    assert told["parameters"] == sum(p.numel() for p in done.model.parameters())
    assert told["layers"] == 4
    assert told["rows"] + told["held_out"] == 24
    assert told["seconds"] > 0
    assert told["memory_mb"] > 100
    assert told["steps_tried"] >= 6


def test_time_is_reckoned_from_steps_and_tokens(base, rows, tmp_path, monkeypatch):
    """With a clock that goes by tokens, a long run takes as many times as long as it has tokens."""
    given = recipe(base, rows, tmp_path / "run", method="dense", steps=None, epochs=2, accumulate=2)
    seen = {"time": 0.0}

    def tick(self, model, inputs, *rest):
        seen["time"] += 1e-3 * inputs["input_ids"].numel()
        return original(self, model, inputs, *rest)

    original = module.build.__globals__["SiftTrainer"].training_step
    monkeypatch.setattr(module.build.__globals__["SiftTrainer"], "training_step", tick)
    monkeypatch.setattr(module.time, "perf_counter", lambda: seen["time"])
    found = dry_run(given, QUIET).estimate
    seen["time"] = 0.0
    train(given, QUIET)
    assert found.seconds == pytest.approx(seen["time"], rel=0.1)


def test_all_bad_rows_and_three_examples_are_shown(base, tmp_path, capsys):
    rows = save_rows(tmp_path / "rows.jsonl", 9)
    red = json.dumps({"prompt": "\x1b[31mred\u202e " * 9, "completion": "[bold]2[/bold]"})
    rows.write_text(rows.read_text() + "{\n" * 30 + red + "\n")
    result, told = run(capsys, base, rows)
    assert told.count("invalid JSON") == 1  # the same fault
    assert "and 27 more: invalid JSON" in told
    assert len(result["bad_rows"]) == 30
    assert "30 rows cannot be used" in told
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert "\\x1b[31mred\\u202e" in told
    assert "«[bold]2[/bold]<|end|>»" in told
    assert result["examples"][0]["parts"][-1] == ["0<|end|>", True]
    assert result["examples"][-1]["place"] == f"{rows}:40"
    assert "estimated: " in told
    assert result["uncertainty"] > 0
    assert list(tmp_path.iterdir()) == [rows]


def run(capsys, base, rows, *more):
    given = ("--model", str(base), "--train", str(rows), "--template", "none", "--rank", "2", "--batch-size", "4")
    return siftune(capsys, "train", *given, "--dry-run", *more)


def test_a_private_run_is_not_tried(base, rows, capsys):
    result, told = run(capsys, base, rows, "--dp-epsilon", "8", "--dp-delta", "1e-3")
    assert (result["seconds"], result["memory_mb"]) == (None, None)
    assert "no estimate" in told


def test_the_steps_of_a_private_run_are_those_that_it_takes(base, rows, tmp_path):
    private = {"dp_epsilon": 8.0, "dp_delta": 1e-3, "accumulate": 3, "steps": None, "epochs": 2}
    given = recipe(base, rows, tmp_path / "run", method="dense", **private)
    assert dry_run(given, QUIET).estimate.steps == train(given, QUIET).summary["steps"] == 4


def test_no_tracker_hears_of_it(base, rows, tmp_path, monkeypatch):
    seen = []
    build = module.build
    monkeypatch.setattr(module, "build", lambda given, *more: seen.append(given) or build(given, *more))
    monkeypatch.setattr("siftune.train.session.check_trackers", lambda names: None)
    dry_run(recipe(base, rows, tmp_path / "run", report_to=("tensorboard",)), QUIET)
    assert [given.report_to for given in seen] == [("none",)]


def test_refusals_are_those_of_the_run(base, rows, capsys, monkeypatch):
    assert "unknown option --dry-rum" in error_of(capsys, "train", "--train", str(rows), "--dry-rum")
    given = ("train", "--model", str(base), "--train", str(rows), "--dry-run")
    assert "leave resume out" in error_of(capsys, *given, "--resume", "--out", "x")
    assert "no linear module" in error_of(capsys, *given, "--targets", "nothing")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in error_of(capsys, *given)


# the plan of the trial


def test_the_trial_begins_with_the_longest_row_and_has_the_runs_batches(tmp_path, rows):
    lengths = np.array([5, 9, 3, 40, 7, 6, 8, 4, 5], dtype=np.int32)
    for grouped in (False, True):
        given = recipe(tmp_path, rows, tmp_path, group_by_length=grouped)
        batches = _batches(given, lengths)
        assert sorted(row for batch in batches for row in batch) == list(range(9))
        tried = _tried_batches(batches, lengths, 2, 3)
        assert len(tried) == 8
        assert 3 in tried[0]
        assert all(batch in batches for batch in tried)
    assert _cost([[0, 1], [3]], lengths) == 2 * 9 + 40


def test_what_comes_in_every_so_many_steps_comes_as_often_in_the_trial(tmp_path, rows):
    def tries(method, **own):
        return _tries(recipe(tmp_path, rows, tmp_path, method=method, **own))

    assert tries("dense") == tries("rst") == 6
    assert tries("ist", interval=10) == 10
    assert tries("ist", interval=4) == 8
    assert tries("ist", interval=100) == 24
    assert tries("gast", support="sample", support_every=7) == 7
    assert tries("ist+gast", interval=4, support="sample", support_every=3) == 12


def test_checkpoints_are_counted(tmp_path, rows):
    assert [_saves(recipe(tmp_path, rows, tmp_path), steps) for steps in (5, 100, 1000)] == [1, 10, 10]
    assert _saves(recipe(tmp_path, rows, tmp_path, save_every=30), 100) == 3
