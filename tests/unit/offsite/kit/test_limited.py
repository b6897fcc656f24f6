"""Children that die of memory, of time or by a signal, and the parent lives."""

import copy
import os
import signal
import sys

import pytest

from siftune.base.errors import KitError, SiftuneError
from siftune.offsite.kit import limited
from siftune.offsite.kit.limited import Child, ChildError, Limits

SMALL = Limits(memory_mb=100, cpu_s=30, wall_s=300)  # other processes may be about
ROOTS = limited._roots()
SPY = """
import os, resource, signal, sys, time
from siftune.base.errors import KitError
from siftune.offsite.kit import tokenizer_trial
calls = []
def answer(request):
    calls.append(request)
    name, value = request
    if name == "about":
        loaded = [name for name in ("torch", "transformers", "numpy") if name in sys.modules]
        return [sorted(os.environ), loaded, "/canary" in sys.path, os.getpid(), value]
    if name == "memory":
        return len(bytes(value * 10**6))
    if name == "loop":
        while True:
            pass
    if name == "sleep":
        time.sleep(100)
    if name == "die":
        print("first", "last \\x1b[31m line", "note: more", sep="\\n", file=sys.stderr, flush=True)
        os.kill(os.getpid(), value) if value > 0 else os._exit(-value)
    if name == "write":
        try:
            with open(value, "w") as file:
                file.write("a" * 10)
        except OSError as error:
            return str(error)
    if name == "fault":
        raise KitError("x is 1")
    return calls
"""


@pytest.fixture
def child(monkeypatch, tmp_path):
    """One that runs a module of its own."""
    (tmp_path / "spy.py").write_text(SPY)
    monkeypatch.setattr(limited, "_roots", lambda: (*ROOTS, str(tmp_path)))
    child = Child("spy", ["setup", "é\ud800"], SMALL)
    yield child
    child.stop()


def test_one_child_answers_all_requests_and_another_follows_after_its_death(child):
    assert child.start() == [["setup", "é\ud800"]]
    assert child.start() is None
    with pytest.raises(KitError, match=r"^x is 1$"):
        child.ask(["fault", 0], SMALL)
    assert child.ask(["calls", 1], SMALL) == [["setup", "é\ud800"], ["fault", 0], ["calls", 1]]
    with pytest.raises(ChildError):
        child.ask(["die", 9], SMALL)
    assert child.ask(["calls", 2], SMALL) == [["setup", "é\ud800"], ["calls", 2]]


def test_the_child_sees_neither_our_environment_nor_torch(child, monkeypatch):
    monkeypatch.setenv("SECRET", "canary")
    monkeypatch.setenv("PYTHONPATH", "/canary")
    names, loaded, leaked, _, value = child.ask(["about", "\ud800"], SMALL)
    assert ("SECRET" in names, loaded, leaked, value) == (False, [], False, "\ud800")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
def test_each_request_has_its_own_memory(child):
    assert child.ask(["memory", 50], SMALL) == 50 * 10**6
    with pytest.raises(ChildError, match="more than 100 MB"):
        child.ask(["memory", 150], SMALL)
    assert child.ask(["memory", 150], Limits(memory_mb=200)) == 150 * 10**6


@pytest.mark.skipif(sys.platform == "win32", reason="only the time on the clock is limited on Windows")
def test_each_request_has_its_own_processor_time_and_none_writes_a_file(child, tmp_path):
    for _ in range(2):
        with pytest.raises(ChildError, match=r"0.2 s of processor time, was ended by SIGPROF"):
            child.ask(["loop", 0], Limits(cpu_s=0.2))
    assert "File too large" in child.ask(["write", str(tmp_path / "file")], SMALL)


def test_time_on_the_clock_is_limited(child):
    child.start()
    with pytest.raises(ChildError, match=r"more than 0.5 s"):
        child.ask(["sleep", 0], Limits(wall_s=0.5))


@pytest.mark.parametrize(("code", "end"), [(signal.SIGSEGV, "was ended by SIGSEGV"), (-3, "ended with code 3")])
def test_a_death_is_named_with_its_last_words(child, code, end):
    with pytest.raises(ChildError, match=rf"{end} \(last \?\[31m line\)"):
        child.ask(["die", int(code)], SMALL)


def test_a_copy_and_a_fork_have_a_child_of_their_own(child):
    first = child.ask(["about", 0], SMALL)[3]
    assert copy.deepcopy(child).ask(["about", 0], SMALL)[3] != first
    read, write = os.pipe()
    if (fork := os.fork()) == 0:
        os.write(write, str(child.ask(["about", 0], SMALL)[3]).encode())
        child.stop()
        os._exit(0)
    os.waitpid(fork, 0)
    assert int(os.read(read, 99)) != first
    assert child.ask(["about", 0], SMALL)[3] == first


def test_where_no_child_can_work_the_kit_is_not_blamed(monkeypatch):
    monkeypatch.setattr(limited, "_roots", lambda: ())
    with pytest.raises(SiftuneError, match=r"cannot work here .*No module named 'siftune'") as caught:
        Child("siftune.offsite.kit.tokenizer_trial", {}).start()
    assert not isinstance(caught.value, KitError)
    monkeypatch.setattr(sys, "executable", os.devnull)
    with pytest.raises(SiftuneError, match="no process can be started"):
        Child("siftune.offsite.kit.tokenizer_trial", {}).start()
