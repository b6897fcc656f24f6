"""Files that would run code if they were unpickled freely do nothing, and are refused in a sentence."""

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.tiny_run import recipe

from siftune.cli.main import main
from siftune.train.folder.checkpoints import seal
from siftune.train.run import train


class Malice:
    """Leaves a file where its pickle is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i}?", "completion": "{i}"}}\n' for i in range(8)))
    train(recipe(base, rows, folder / "run", steps=2, save_every=1), Console(quiet=True))
    return folder


@pytest.fixture
def planted(run, tmp_path):
    """Return a function that plants a pickle in a copy of the run, and a file that is there if it was loaded."""
    copy, trace = tmp_path / "copy", tmp_path / "trace"
    shutil.copytree(run, copy)

    def plant(name):
        torch.save(Malice(trace), copy / name)
        return copy / "run", trace

    return plant


def assert_refused(capsys, words, trace):
    capsys.readouterr()
    code, said = main(list(map(str, words))), capsys.readouterr().err
    assert not trace.exists()
    assert (code, said.count("siftune: error: ")) == (2, 1), said
    assert "Traceback" not in said
    assert "weights_only" not in said  # torch's advice


def test_the_pickle_would_do_something(tmp_path):
    torch.save(Malice(tmp_path / "trace"), tmp_path / "malice.pt")
    torch.load(tmp_path / "malice.pt", weights_only=False)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "adapter_model.safetensors"]
)
def test_a_checkpoint(planted, capsys, name):
    run, trace = planted(f"run/checkpoints/checkpoint-1/{name}")
    seal_again(run / "checkpoints" / "checkpoint-1")
    shutil.rmtree(run / "checkpoints" / "checkpoint-2")
    assert_refused(capsys, ["train", "--resume", run], trace)


def seal_again(checkpoint):
    """As whoever plants something would do."""
    (checkpoint / ".unfinished").touch()
    seal(checkpoint)


def test_an_adapter(planted, capsys):
    run, trace = planted("run/adapter/adapter_model.bin")
    (run / "adapter" / "adapter_model.safetensors").unlink()
    assert_refused(capsys, ["eval", run, "--data", run.parent / "rows.jsonl"], trace)


def test_a_model(planted, base, capsys, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(base, model)
    (model / "model.safetensors").unlink()
    run, trace = planted("pytorch_model.bin")
    shutil.move(run.parent / "pytorch_model.bin", model)
    rows = run.parent / "rows.jsonl"
    assert_refused(capsys, ["train", "--model", model, "--train", rows, "--out", tmp_path / "new"], trace)


def test_arguments_that_other_programs_leave_are_not_opened(planted, capsys):
    run, trace = planted("run/checkpoints/checkpoint-1/training_args.bin")
    seal_again(run / "checkpoints" / "checkpoint-1")
    shutil.rmtree(run / "checkpoints" / "checkpoint-2")
    (run / "run.json").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    assert not trace.exists()
