"""The README's commands and its script run as printed on SmolLM2, in one folder with rows of the demo's task."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from siftune.cli.demo_rows import mixed_pool

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FAST = {"train": "--steps 2", "emulate": "--rows 32"}  # instead of one pass over the rows, and of 1,024 texts

pytestmark = pytest.mark.integration


@pytest.fixture
def run(tmp_path):
    """Run a command in the folder of the rows."""
    names, parts = ("pool", "few", "heldout"), mixed_pool(96, 24, 8, 0)
    for name, rows in zip(names, parts, strict=True):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(*words):
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    return run


def as_words(line):
    """A command with the packaged model and a file of the folder, and with little to do."""
    line = re.sub(r"\b(HUB_ID|MODEL)\b", "smollm2", line.partition("#")[0]).replace("FILE", "few.jsonl")
    words = shlex.split(line)
    return [*words, *FAST.get(words[1], "").split()]


@pytest.mark.usefixtures("smollm2")
def test_commands_and_script_run_in_order(run, tmp_path):
    section = README.partition("## Your rows")[2].partition("In your own script")[0]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL).group(1)
    own = [part for line in block.splitlines() for part in line.split(" && ")]
    parties = re.findall(r"owner +(siftune [^#\n]+)", README)
    assert [line.split()[1] for line in own] == ["train", "train", "eval", "ask", "export"]
    assert [line.split()[1] for line in parties] == ["emulate", "train", "plug"]
    for line in (*own, *parties):
        run(*as_words(line))
    run(sys.executable, "-c", re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1).replace("=60", "=2"))
    assert (tmp_path / "runs" / "sifted" / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "TUNED" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "script" / "checkpoint-2").is_dir()
