"""`siftune train` in two processes, however they were started, is one run, and ends as one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_run import choices_of, lines, save_base, save_rows

from siftune.train.folder.checkpoints import newest_checkpoint, step_of

pytestmark = pytest.mark.distributed

RECIPE = """\
template: none
max_length: 64
rank: 2
method: ist
ist: {interval: 2, score_batch_size: 4, active: 0.5}
lr: 0.01
log_every: 1
save_every: 2
eval_every: 1
"""
SIFTUNE = [sys.executable, "-m", "siftune"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "siftune"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Words that stand after `siftune train`, but for batch size, steps and folder."""
    place = tmp_path_factory.mktemp("given")
    recipe = place / "recipe.yaml"
    recipe.write_text(RECIPE)
    base, rows = save_base(place / "base"), of_two_sources(save_rows(place / "rows.jsonl"))
    held_out = of_two_sources(save_rows(place / "eval.jsonl", count=7))  # the ranks share one
    return [str(recipe), "--model", str(base), "--train", str(rows), "--eval", str(held_out)]


def of_two_sources(path):
    """Name the source of each row of a file."""
    rows = [{**row, "source": "even" if at % 2 else "odd"} for at, row in enumerate(lines(path))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(command, words, folder):
    """Start a command in a folder; it is killed where the test ends before it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "train", *words], cwd=folder, env=environment, **pipes)


def finish(process, seconds=280):
    """Wait for a command; its output and what it said."""
    try:
        return process.communicate(timeout=seconds)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def alone(given, tmp_path_factory):
    """A run in one process, with the batch of both."""
    folder = tmp_path_factory.mktemp("alone")
    process = start(SIFTUNE, [*given, "--batch-size", "8", "--steps", "4", "--out", "run"], folder)
    _, said = finish(process)
    assert process.returncode == 0, said
    return folder / "run"


def by_source(line):
    """The losses of sources in a line of the log."""
    return {key: value for key, value in line.items() if "loss/" in key}


def is_one_run(run, alone):
    """Weights and losses are those of one process, and nothing was written twice."""
    tuned, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, alone))
    assert tuned.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(tuned[name], value, rtol=1e-4, atol=1e-5)
    losses = [[by_source(line) for line in lines(folder / "metrics.jsonl")] for folder in (run, alone)]
    assert {"loss/even", "eval_loss/odd"} <= set().union(*losses[1])
    assert losses[0] == [pytest.approx(line, abs=2e-4) for line in losses[1]]
    assert [line["step"] for line in lines(run / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in choices_of(run)] == [0, 1, 2, 3]
    assert not list(run.rglob("*.partial"))


def test_torchrun_is_one_run_in_a_folder_that_rank_0_names_with_a_sharded_base(given, alone, tmp_path):
    process = start(TORCHRUN, [*given, "--batch-size", "4", "--steps", "4", "--sharding", "fsdp"], tmp_path)
    _, said = finish(process)
    assert process.returncode == 0, said
    assert said.count("done: 4 steps") == said.count("step 4/4  loss") == 1
    (run,) = (tmp_path / "runs").iterdir()
    is_one_run(run, alone)


def test_what_all_ranks_refuse_is_said_once(given, tmp_path):
    process = start(TORCHRUN, [*given, "--eval", "nowhere.jsonl"], tmp_path)
    _, said = finish(process)
    assert process.returncode == 1  # torchrun's own
    assert said.count("siftune: error: ") == 1
    assert "nowhere.jsonl" in said


def wait_for(path, process, seconds=240):
    """Wait until a file is there."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        assert process.poll() is None, finish(process)[1]
        time.sleep(0.1)


def test_a_process_that_dies_ends_the_run_and_keeps_what_was_saved(given, tmp_path):
    words = [*given, "--batch-size", "4", "--steps", "4000", "--out", "run"]
    process = start(TORCHRUN, words, tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    wait_for(checkpoints / "checkpoint-6", process)  # the one before is complete
    ranks = {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children()}
    ranks["1"].kill()
    _, said = finish(process, 60)
    assert process.returncode == 1
    assert "Signal 9 (SIGKILL) received" in said  # torchrun's words
    assert not ranks["0"].is_running()
    newest = newest_checkpoint(checkpoints, fresh=False)
    assert step_of(newest) >= 4
    assert (newest / "adapter_model.safetensors").is_file()


def test_an_interrupt_reaches_all_and_saves_what_was_trained(given, tmp_path):
    words = [*given, "--batch-size", "4", "--steps", "4000", "--out", "run"]
    process = start(TORCHRUN, words, tmp_path)
    wait_for(tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json", process)
    process.send_signal(signal.SIGTERM)
    _, said = finish(process, 90)
    assert process.returncode == 1, said  # torchrun's own
    (line,) = (line for line in said.splitlines() if line.startswith("siftune: interrupted;"))
    assert "the adapter after step" in line
    assert line.endswith("`siftune train --resume run` continues from there")
    assert Path(tmp_path, "run", "adapter", "adapter_model.safetensors").is_file()
