"""Several ranks of a worker of tests/distributed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]


def run(folder, ranks, worker="worker.py", python=sys.executable, launched=False, **settings):
    """Train in `ranks` processes of a Python; returns what each of them ended with. One is launched where asked for."""
    folder.mkdir()
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    launcher = launcher if launched or ranks > 1 else []
    command = [python, *launcher, str(TESTS / "distributed" / worker), str(folder), json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
