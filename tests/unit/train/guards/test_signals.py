"""Signals that arrive after the last step; those during training are tested with the command."""

import json
import os
import signal

import pytest
from rich.console import Console
from support.tiny_run import recipe

from siftune.train.folder.run_folder import RunFolder
from siftune.train.run import train


@pytest.mark.parametrize("times", [1, 2])
def test_the_first_signal_while_results_are_written_ends_the_run_after_them(base, rows, tmp_path, monkeypatch, times):
    def interrupted(folder, parts):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
        replace(folder, parts)

    replace = RunFolder.replace
    monkeypatch.setattr(RunFolder, "replace", interrupted)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as for every command
    try:
        with pytest.raises(KeyboardInterrupt):
            train(recipe(base, rows, tmp_path / "run", method="dense", steps=1), Console(quiet=True))
        assert signal.getsignal(signal.SIGTERM) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "run" / "adapter").exists() is (times == 1)
    if times == 1:
        assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
