"""Processes that one command has started end with it."""

import io
import signal
import subprocess
import sys

import pytest

from siftune.cli.launch import _Rank, _stop


def test_a_second_interrupt_leaves_no_process_behind(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    ranks = [_Rank(number, subprocess.Popen(sleep), io.BytesIO()) for number in range(2)]
    monkeypatch.setattr(_Rank, "end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _stop(ranks, interrupted=False)
    assert [rank.process.wait(10) for rank in ranks] == [-signal.SIGKILL] * 2
