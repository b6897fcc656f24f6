"""One command in several processes on this machine: what `siftune train --processes N` starts.

The environment of every process is that of torchrun, so that under it, or `accelerate launch -m siftune train`, the
ranks do the same. What is ours about it: the command keeps its one sentence, its exit code and its JSON, and a rank
that ends early ends the others, which would wait for it.

torchrun's agent is not used here: it signals every rank once, also at the first failure, and after a timeout kills
those that still run. In trial runs with torch 2.13 and the usual 30 s, rank 0 left no adapter after SIGTERM during a
longer evaluation, nor in one of two runs after `kill -9` of rank 1.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any

from siftune.base.environment import LEFT_ALONE, TOLD_BY_PARENT, threads_of_each
from siftune.base.errors import InputError

_LOOK = 0.05  # seconds between two looks at the processes
_CAUSE = 5.0  # seconds that the process which left another one alone may take to end
_GRACE = 30.0  # seconds that they have to end after a signal: what was trained is saved in this time


class RankFailed(InputError):
    """A process of the launch failed, with this exit code."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.exit_code = code


@dataclass
class _Rank:
    number: int
    process: "subprocess.Popen[bytes]"
    output: IO[bytes]

    def told(self) -> dict[str, Any]:
        """What it printed as JSON, a result or an error; empty where it came to neither."""
        self.output.seek(0)
        lines = self.output.read().decode("utf-8", "replace").splitlines()
        try:
            return dict(json.loads(lines[-1])) if lines else {}
        except ValueError:
            return {}

    def left_alone(self) -> bool:
        """Whether it failed because another one did."""
        return self.told().get("error") == LEFT_ALONE

    def ends_within(self, patience: float) -> bool:
        """Wait for at most `patience` seconds; whether it ended."""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self, patience: float) -> None:
        """Wait until it has ended, and end it by force where that takes too long."""
        if not self.ends_within(patience):
            self.process.kill()
            self.process.wait()


def launch(arguments: Sequence[str], processes: int) -> dict[str, Any]:
    """Run `siftune` with these arguments in several processes of this machine, and wait for them.

    They know each other as ranks of a process group; what rank 0 printed as its JSON object is the result.

    Raises:
        RankFailed: One of them ended early; the others were ended then.
        KeyboardInterrupt: As it came; what rank 0 says to that is its note.
    """
    ranks: list[_Rank] = []
    with ExitStack() as stack:
        meeting = _meeting_place(processes)
        try:
            for number in range(processes):
                ranks.append(_start(arguments, number, meeting, stack.enter_context(tempfile.TemporaryFile())))
            _wait(ranks)
        except BaseException as stop:
            _stop(ranks, isinstance(stop, KeyboardInterrupt))
            if ranks and isinstance(stop, KeyboardInterrupt) and (note := _after_interrupt(ranks[0].told())):
                stop.add_note(note)
            raise
        return ranks[0].told()


def _after_interrupt(told: dict[str, Any]) -> str:
    """What a rank that was interrupted said besides that it was; empty where that is all."""
    return str(told.get("error", "")).removeprefix("interrupted").removeprefix("; ")


def _meeting_place(processes: int) -> dict[str, str]:
    """Where the ranks find each other, a port of this machine that is free now, and what they share."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(processes)
    return {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": threads_of_each(processes), TOLD_BY_PARENT: "1",
    }  # fmt: skip


def _start(arguments: Sequence[str], number: int, shared: dict[str, str], output: IO[bytes]) -> _Rank:
    """Start a rank, in a process group of its own: a terminal's Ctrl-C is to reach it once, from here."""
    own = {**shared, "RANK": str(number), "LOCAL_RANK": str(number)}
    command = [sys.executable, "-m", "siftune", *arguments, "--json"]
    process = subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, stdout=output, process_group=0)
    return _Rank(number, process, output)


def _wait(ranks: Sequence[_Rank]) -> None:
    """Wait until all are done, or one has failed."""
    while True:
        if any(rank.process.poll() for rank in ranks):
            raise _failure(ranks)
        if all(rank.process.returncode == 0 for rank in ranks):
            return
        time.sleep(_LOOK)


def _failure(ranks: Sequence[_Rank]) -> RankFailed:
    """What a rank that failed said, or how it ended: of several one that was ended, or that knows why."""
    until = time.monotonic() + _CAUSE
    while True:
        time.sleep(_LOOK)  # those that fail because of another one do so at once
        failed = [rank for rank in ranks if rank.process.poll()]
        rank = min(failed, key=lambda rank: (rank.left_alone(), rank.process.returncode == 1))
        if not rank.left_alone() or time.monotonic() > until:
            break
    code = rank.process.returncode
    if "error" in (told := rank.told()):
        return RankFailed(str(told["error"]), code)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return RankFailed(
        f"process {rank.number} of the run {how}, and the others were stopped; `siftune train --resume RUN` continues "
        "from the newest checkpoint, where there is one",
        max(code, 1),
    )


def _stop(ranks: Sequence[_Rank], interrupted: bool) -> None:
    """End what still runs: rank 0, which saves what was trained, as by Ctrl-C, and then the others by force.

    They live until then, since rank 0 may be waiting for them and hears of no signal meanwhile. Where one of them has
    failed, rank 0 finds out by itself.
    """
    try:
        for _ in range(2 * interrupted):  # the second ends it at once, where a step takes long
            if ranks and ranks[0].process.poll() is None:
                ranks[0].process.send_signal(signal.SIGTERM)  # a background job's ranks may not hear SIGINT
                ranks[0].ends_within(_GRACE)
        for rank in ranks:
            rank.end(0.0 if rank.number else _GRACE)
    finally:  # a second Ctrl-C comes here while rank 0 is saving: none may continue alone
        for rank in ranks:
            rank.process.kill()
