"""Two ranks under DDP draw the same layers and reach the weights of one rank with their batches together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent


def run(folder, ranks, **settings):
    """Train in `ranks` processes; returns what each of them ended with."""
    folder.mkdir()
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(HERE / "worker.py"), str(folder), json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    (result,) = run(tmp_path_factory.mktemp("one") / "run", 1, per_device_train_batch_size=8)
    return result


@pytest.mark.parametrize(
    "settings",
    [
        {"ddp_find_unused_parameters": True},
        {"ddp_find_unused_parameters": False},
        {"ddp_find_unused_parameters": False, "activation_checkpointing": True,
         "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=["find unused", "no search", "checkpointing", "accumulation"],
)  # fmt: skip
def test_two_ranks_are_one(tmp_path, alone, settings):
    settings = {"per_device_train_batch_size": 4, **settings}
    first, second = run(tmp_path / "two", 2, **settings)
    assert first["layers"] == second["layers"] == alone["layers"]
    assert torch.equal(first["importance"], second["importance"])
    torch.testing.assert_close(first["importance"], alone["importance"], rtol=1e-4, atol=1e-6)
    for name, value in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-5)
