"""The README's script runs as printed, in a folder with a pool and a few rows, on a tiny model."""

import re
from pathlib import Path

from support.tiny_run import save_base, save_rows

import siftune.models.smollm2

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_script_runs(tmp_path, monkeypatch):
    script = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len(script.splitlines()) <= 12
    save_base(tmp_path / "base")
    save_rows(tmp_path / "pool.jsonl", 36)
    save_rows(tmp_path / "few.jsonl", 12)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(siftune.models.smollm2, "pull_smollm2", lambda: tmp_path / "base")
    exec(compile(script, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "sift" / "sifted.jsonl").is_file()
    assert (tmp_path / "runs" / "script" / "checkpoint-60" / "adapter_model.safetensors").is_file()
