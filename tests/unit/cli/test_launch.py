"""Processes that one command has started end with it."""

import io
import json
import signal
import subprocess
import sys

import pytest

from siftune.base.environment import LEFT_ALONE
from siftune.cli.launch import RankFailed, _after_interrupt, _Rank, _stop, _wait


def test_a_second_interrupt_leaves_no_process_behind(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    ranks = [_Rank(number, subprocess.Popen(sleep), io.BytesIO()) for number in range(2)]
    monkeypatch.setattr(_Rank, "end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _stop(ranks, interrupted=False)
    assert [rank.process.wait(10) for rank in ranks] == [-signal.SIGKILL] * 2


def test_a_process_that_was_left_alone_does_not_speak_for_the_one_that_was_killed():
    """However soon it ends: the other one may be seen to have ended only later."""
    alone = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    alone.wait(20)
    killed = subprocess.Popen([sys.executable, "-c", "import os, time; time.sleep(0.5); os.kill(os.getpid(), 9)"])
    said = json.dumps({"error": LEFT_ALONE}).encode()
    ranks = [_Rank(0, alone, io.BytesIO(said)), _Rank(1, killed, io.BytesIO())]
    with pytest.raises(RankFailed, match="process 1 of the run was ended by SIGKILL") as failure:
        _wait(ranks)
    assert failure.value.exit_code == 1


@pytest.mark.parametrize(
    ("told", "note"),
    [({}, ""), ({"error": "interrupted"}, ""), ({"error": "interrupted; saved in run"}, "saved in run")],
)
def test_that_a_rank_was_interrupted_is_not_said_twice(told, note):
    assert _after_interrupt(told) == note
