"""Process untrusted data in a resource-limited subprocess. If the child dies, the parent reports it in one sentence.

Libraries in other languages abort where memory runs out, and no `except` sees that. The child is a fresh interpreter,
never a fork of this process and its threads: it is isolated from the user's site and environment, imports one module of
ours, takes JSON on its standard input and answers with JSON. On Linux, memory and processor time are limited by the
kernel. On macOS memory is not, because the kernel there does not hold to it; on Windows neither is: there, only the
time on the clock is limited, and what keeps memory bounded is what is checked before.
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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from siftune.base.errors import KitError, SiftuneError
from siftune.offsite.kit.strict import brief

_BOOT = "import sys; sys.path += sys.argv[3:]; from siftune.offsite.kit.limited import serve; serve(*sys.argv[1:3])"
_PACKAGES = ("siftune", "tokenizers", "jinja2", "markupsafe")  # the child's path has the folders of these alone
# what an interpreter may need in order to start, of the parent's environment
_KEPT = ("SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# one thread, and one pool of memory: threads reserve more address space than they use
_SET = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
_UNFIT = 1  # exit code of an interpreter that could not even import our module


@dataclass(frozen=True)
class Limits:
    """Limits of the subprocess; the values are ours."""

    memory_mb: int = 2048  # above what it uses before it sees the data, in 10^6 bytes
    cpu_s: int = 30  # processor time
    wall_s: float = 120  # time on the clock


def run_limited(module: str, request: Any, limits: Limits) -> Any:
    """Have `module.answer(request)` computed by a child; request and answer are of plain types.

    The module is one of siftune that imports little.

    Raises:
        KitError: `answer` raised one, or the child died of the data or ran over a limit.
        SiftuneError: No child can be started here.

    Example:
        >>> run_limited("siftune.offsite.kit.tokenizer_trial", {"tokenizer": text, "template": None}, Limits())
    """
    command = [sys.executable, "-I", "-S", "-c", _BOOT, module, json.dumps(dataclasses.asdict(limits)), *_roots()]
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=limits.wall_s,
            env=kept | _SET,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except subprocess.TimeoutExpired as error:
        raise KitError(f"it was tried in a process of its own, which took more than {limits.wall_s:g} s") from error
    except OSError as error:
        raise SiftuneError(f"no process can be started to try out what came with the kit ({brief(error)})") from error
    return _answer_of(done, limits)


@cache
def _roots() -> tuple[str, ...]:
    specs = [importlib.util.find_spec(name) for name in _PACKAGES]
    folders = [str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin is not None]
    return tuple(dict.fromkeys(folders))


def _answer_of(done: "subprocess.CompletedProcess[bytes]", limits: Limits) -> Any:
    if done.returncode == 0:
        reply = json.loads(done.stdout)
        if "fault" in reply:
            raise KitError(reply["fault"])
        return reply["value"]
    said = _last_words(done.stderr.decode(errors="replace"))
    if done.returncode == _UNFIT:
        raise SiftuneError(f"the process that tries out what came with the kit cannot work here ({said})")
    raise KitError(
        f"it was tried in a process of its own, with {limits.memory_mb} MB and {limits.cpu_s} s of processor time; "
        f"this {_end(done.returncode)} ({said})"
    )


def _last_words(text: str) -> str:
    """The last message of a process; a note that Rust adds is left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("note:")]
    return brief(ValueError(lines[-1])) if lines else "it said nothing"


def _end(code: int) -> str:
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended with code {code}"


def serve(module: str, limits: str) -> None:
    """The child: set its limits, answer one request, and report errors on untrusted data as text."""
    answer = importlib.import_module(module).answer
    _limit(Limits(**json.loads(limits)))
    try:
        reply = {"value": answer(json.load(sys.stdin.buffer))}
    except KitError as error:
        reply = {"fault": str(error)}
    except MemoryError:
        reply = {"fault": "it was tried in a process of its own, which needed more memory than it may have"}
    sys.stdout.write(json.dumps(reply))


def _limit(limits: Limits) -> None:
    """Limit this process where the system can: processor time, memory above what is in use now, no files."""
    if sys.platform != "win32":
        import resource

        for kind, most in ((resource.RLIMIT_CPU, limits.cpu_s), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
            _lower(kind, most)
    limit_memory(limits.memory_mb)


def limit_memory(more_mb: int) -> None:
    """Limit this process to `more_mb` MB above its current memory, or to a lower limit if it had one."""
    statm = Path("/proc/self/statm")
    if sys.platform != "win32" and statm.exists():
        import resource

        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        _lower(resource.RLIMIT_AS, used + more_mb * 10**6)


def _lower(kind: int, most: int) -> None:
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(kind)
        lowest = min([most, *(old for old in (soft, hard) if old != resource.RLIM_INFINITY)])
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (lowest, hard))
