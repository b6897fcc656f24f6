"""The README's script and its two-party commands run as printed, in order, in one folder, on few texts of the base."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.integration


@pytest.mark.usefixtures("smollm2")
def test_blocks_run_in_order(tmp_path):
    rows = [{"prompt": f"Sum of {i} and {2 * i}?", "completion": f" {3 * i}"} for i in range(1, 33)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    script = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    commands = re.findall(r"owner +(siftune [^#\n]+)", README)
    assert [command.split()[1] for command in commands] == ["emulate", "train", "plug"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    commands[0] += " --rows 32"
    for command in ([sys.executable, "-c", script], *(line.replace("FILE", "rows.jsonl").split() for line in commands)):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "runs" / "script" / "checkpoint-30").is_dir()
    assert (tmp_path / "TUNED" / "model.safetensors").is_file()
