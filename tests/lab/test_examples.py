"""The scripts in examples/ run on a tiny model."""

import runpy
import sys
from pathlib import Path

import pytest
from support.tiny_run import save_rows

from lab.random_llama import save_llama

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.lab
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example(script, tmp_path, monkeypatch, capsys):
    words = []
    if script.stem != "plain_loop":  # which makes its own model
        words = [save_llama(tmp_path / "base", 6, 32, 128), str(save_rows(tmp_path / "rows.jsonl", 16)), "2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out
