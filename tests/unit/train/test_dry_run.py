"""A run that is not made: what it says is what the run does, and nothing is left behind."""

import json

from rich.console import Console
from support.commands import error_of, siftune
from support.tiny_run import recipe, save_rows

from siftune.train import dry_run as module
from siftune.train.dry_run import dry_run
from siftune.train.run import train
from siftune.train.trainer import SiftTrainer

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
    assert told["memory_mb"] > 100


def test_memory_is_that_of_the_longest_rows_once_the_optimizer_has_its_states(base, rows, tmp_path, monkeypatch):
    given = recipe(base, rows, tmp_path / "run", method="dense", accumulate=2, steps=None, epochs=1)
    lengths, states = [], []

    def step(self, model, inputs, *rest):
        lengths.extend(inputs["attention_mask"].sum(1).tolist())
        states.append(len(self.optimizer.state))
        return original(self, model, inputs, *rest)

    original = SiftTrainer.training_step
    monkeypatch.setattr(SiftTrainer, "training_step", step)
    monkeypatch.setattr(module, "peak_memory_mb", lambda: 12.5 if states[-1] else 0.0)
    found = dry_run(given, QUIET)
    every = sorted(found.prepared.data["train"]["length"])
    assert sorted(lengths) == sorted(2 * every[-8:])
    assert every[-8] > every[0]
    assert states[:2] == [0, 0]
    assert found.size.memory_mb == 12.5
    assert found.size.steps == 3


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
    assert "MB peak memory" in told
    assert list(tmp_path.iterdir()) == [rows]


def run(capsys, base, rows, *more):
    given = ("--model", str(base), "--train", str(rows), "--template", "none", "--rank", "2", "--batch-size", "4")
    return siftune(capsys, "train", *given, "--dry-run", *more)


def test_a_private_run_is_not_tried(base, rows, capsys):
    result, told = run(capsys, base, rows, "--dp-epsilon", "8", "--dp-delta", "1e-3")
    assert result["memory_mb"] is None
    assert "memory is not measured" in told


def test_the_steps_of_a_private_run_are_those_that_it_takes(base, rows, tmp_path):
    private = {"dp_epsilon": 8.0, "dp_delta": 1e-3, "accumulate": 3, "steps": None, "epochs": 2}
    given = recipe(base, rows, tmp_path / "run", method="dense", **private)
    assert dry_run(given, QUIET).size.steps == train(given, QUIET).summary["steps"] == 4


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
