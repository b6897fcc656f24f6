"""Process untrusted data in a resource-limited subprocess. If the child dies, the parent reports it in one sentence.

Libraries in other languages abort if memory runs out, and no `except` sees that. The child is a fresh interpreter,
never a fork of this process and its threads. It is isolated from the user's site and environment, imports one module of
ours, and answers requests, a line of JSON each, until its standard input ends. Each request has its own limits.

On Linux, memory and processor time are limited by the kernel. On macOS memory is not, because the kernel there does not
enforce the limit. On Windows only the time on the clock is limited.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from siftune.base.errors import KitError, SiftuneError
from siftune.offsite.kit.strict import brief

_BOOT = "import sys; sys.path += sys.argv[2:]; from siftune.offsite.kit.limited import serve; serve(sys.argv[1])"
_PACKAGES = ("siftune", "tokenizers", "jinja2", "markupsafe")  # the child's path has the folders of these alone
# what an interpreter may need in order to start, of the parent's environment
_INHERITED = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# one thread, and one pool of memory: threads reserve more address space than they use
_SET = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
_UNFIT = 1  # exit code of an interpreter that could not even import our module


class ChildError(KitError):
    """The child died of the data, or exceeded a limit."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request; the values are ours."""

    memory_mb: int = 2048  # above the memory in use when the request arrives, in 10^6 bytes
    cpu_s: float = 30  # processor time
    wall_s: float = 120  # time on the clock


class Child:
    """A limited process that answers requests on untrusted data one after the other.

    It starts with the first request, and again after it died. A process that was forked from this one starts its own.

    Example:
        >>> Child("siftune.offsite.kit.tokenizer_trial", {"tokenizer": text, ...}).ask({"encode": ["Hello."]})
    """

    def __init__(self, module: str, setup: Any, limits: Limits | None = None) -> None:
        """Name what it runs; nothing starts yet.

        Args:
            module: A module of siftune that imports little and has a function `answer(request)`.
            setup: The first request to each new process, of plain types.
            limits: Limits of that request.
        """
        self._module, self._setup, self._limits = module, setup, limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # id of the process that started it

    def __reduce__(self) -> tuple[Any, ...]:
        return Child, (self._module, self._setup, self._limits)

    def start(self) -> Any:
        """Start the process if there is none, and return its answer to the setup, or None.

        Raises:
            KitError, SiftuneError: As for `ask`.
        """
        if self._process is not None and self._owner == os.getpid():
            return None
        command = [sys.executable, "-I", "-S", "-c", _BOOT, self._module, *_roots()]
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ} | _SET
        flags, pipe = getattr(subprocess, "CREATE_NO_WINDOW", 0), subprocess.PIPE
        try:
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, creationflags=flags
            )
        except OSError as error:
            raise SiftuneError(f"no process can be started to try out parts of the kit ({brief(error)})") from error
        self._process, self._owner = process, os.getpid()
        weakref.finalize(self, _end, process, self._owner)
        return self.ask(self._setup, self._limits)

    def ask(self, request: Any, limits: Limits) -> Any:
        """Have `module.answer(request)` computed; request and answer are of plain types.

        Raises:
            KitError: `answer` raised one.
            ChildError: The child died of the data or exceeded a limit.
            SiftuneError: No child can work here.
        """
        self.start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limits.wall_s, end)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it is dead, as the missing reply shows
                process.stdin.write(json.dumps([dataclasses.asdict(limits), request]).encode() + b"\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except BaseException:  # Ctrl-C: the next reply would answer this request
            self.stop()
            raise
        finally:
            timer.cancel()
        if line.endswith(b"\n"):
            reply = json.loads(line)
            if "fault" in reply:
                raise KitError(reply["fault"])
            if "memory" in reply:
                raise ChildError(f"it needs more than {limits.memory_mb} MB of memory in a process of its own")
            return reply["value"]
        errors = process.stderr.read() if process.stderr is not None else b""
        code = process.wait()
        self.stop()
        if late.is_set():
            raise ChildError(f"it takes more than {limits.wall_s:g} s in a process of its own")
        raise _death(code, errors.decode(errors="replace"), limits)

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            _end(self._process, self._owner)
        self._process = None


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    if owner == os.getpid():  # a fork of the owner leaves it alone
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()


@cache
def _roots() -> tuple[str, ...]:
    specs = [importlib.util.find_spec(name) for name in _PACKAGES]
    folders = [str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin is not None]
    return tuple(dict.fromkeys(folders))


def _death(code: int, errors: str, limits: Limits) -> SiftuneError:
    """The error of a child that ended without a reply, with its last message; Rust's notes are left out."""
    lines = [line for line in errors.splitlines() if line.strip() and not line.startswith("note:")]
    last = brief(ValueError(lines[-1])) if lines else "without a message"
    if code == _UNFIT:
        return SiftuneError(f"the process that tries out parts of the kit cannot work here ({last})")
    try:
        end = f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        end = f"ended with code {code}"
    return ChildError(
        f"a process of its own, with {limits.memory_mb} MB and {limits.cpu_s:g} s of processor time, {end} ({last})"
    )


def serve(module: str) -> None:
    """The child: answer requests, each within its limits, and report errors on untrusted data as text."""
    answer = importlib.import_module(module).answer
    if sys.platform != "win32":
        import resource

        for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
            resource.setrlimit(kind, (0, 0))
    for line in sys.stdin.buffer:
        try:
            limits, request = json.loads(line)
            _limit(Limits(**limits))
            reply = {"value": answer(request)}
        except KitError as error:
            reply = {"fault": str(error)}
        except MemoryError:
            reply = {"memory": None}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def _limit(limits: Limits) -> None:
    """Limit the processor time of this process from now on, and its memory above the memory in use."""
    if sys.platform != "win32":
        import resource

        signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)  # by default, its signal ends the process
        statm = Path("/proc/self/statm")
        if statm.exists():
            used = int(statm.read_text().split()[0]) * resource.getpagesize()
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            most = used + limits.memory_mb * 10**6
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
