"""Sifting in two processes: the scores and rows of one process with the batch of both."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support.tiny_run import save_base

pytestmark = pytest.mark.distributed

SIFTUNE = [sys.executable, "-m", "siftune"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "siftune"]
SIFT = ["--max-length", "64", "--template", "none", "--lr", "0.01", "--steps", "3"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a model, an odd number of pool rows, and a target of which eight rows fill the batches."""
    place = tmp_path_factory.mktemp("task")
    save_base(place / "base")
    sums = [{"prompt": f"{i}+{i}?", "completion": str(i + i)} for i in range(29)]
    words = [{"prompt": f"say {i}", "completion": "hello " * 3} for i in range(22)]
    for name, rows in (("pool", words + sums[16:]), ("few", sums[:16])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def call(command, folder, *more):
    """Run a command in a folder; returns its output and messages."""
    inputs = ["--model", "base", "--train", "pool.jsonl", "--target", "few.jsonl"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *inputs, *more], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def scores(folder):
    with (folder / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    return np.array([float(line["score"] or "nan") for line in lines]), [line["selected"] for line in lines]


def test_ranks_share_the_rows(task):
    call([*SIFTUNE, "sift"], task, *SIFT, "--batch-size", "4", "--out", "alone")
    output, messages = call([*TORCHRUN, "sift"], task, *SIFT, "--batch-size", "2", "--out", "ranks", "--json")
    assert json.loads(output)["pool"] == 35
    assert messages.count("next: `siftune train") == 1
    (alone, of_one), (ranks, of_two) = scores(task / "alone"), scores(task / "ranks")
    assert 0 < np.isnan(alone).sum() < 35  # rows of the other task
    np.testing.assert_allclose(ranks, alone, atol=1e-3)
    assert of_two == of_one
    again, _ = call([*TORCHRUN, "sift"], task, *SIFT, "--batch-size", "2", "--out", "ranks", "--json")
    assert json.loads(again)["selected"] == json.loads(output)["selected"]
    before = (task / "ranks" / "scores.csv").read_bytes()
    for name in ("scores.csv", "similar.jsonl", "1-losses.jsonl"):  # as after a kill in the second training
        (task / "ranks" / name).unlink()
    call([*TORCHRUN, "sift"], task, *SIFT, "--batch-size", "2", "--out", "ranks")
    assert (task / "ranks" / "scores.csv").read_bytes() == before


def test_ranks_sift_and_train(task):
    settings = ["--max-length", "64", "--template", "none", "--rank", "2", "--steps", "2", "--batch-size", "2"]
    _, messages = call([*TORCHRUN, "train"], task, *settings, "--out", "run", "--sift", "0.4")
    assert messages.count("selected 14 of 35 rows") == messages.count("done: 2 steps") == 1
    dropped = (task / "run" / "sift" / "dropped.csv").read_text().splitlines()
    assert len(dropped) == 1 + 21
    assert f"drop_rows: {task / 'run' / 'sift' / 'dropped.csv'}" in (task / "run" / "recipe.yaml").read_text()
