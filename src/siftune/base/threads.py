"""How torch's threads share the processor, which is settled before torch is loaded.

Left to themselves they fail on a machine that is not theirs alone: a thread that waits for the others turns in circles
and takes the processor from those that it waits for, and where a container may use 2 of 64 processors 64 of them start.
"""

import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

_LIMITS = Path("/sys/fs/cgroup")
_OURS = "SIFTUNE_SET_THREADS"  # there where the number of threads is not the user's
_TURNS = "1000"  # times that a waiting thread looks before it sleeps; GNU's OpenMP looks some 300,000 times


def settle_threads(environment: MutableMapping[str, str] = os.environ, limits: Path = _LIMITS) -> None:
    """Have waiting threads sleep soon, and start no more of them than a container may run; ours.

    What the user has set is left as it is.

    Args:
        environment: Variables of the process; what is not there is set.
        limits: Where the system keeps a container's limits.

    Example:
        >>> variables = {"OMP_NUM_THREADS": "1"}
        >>> settle_threads(variables)
        >>> variables["OMP_NUM_THREADS"]
        '1'
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _TURNS)
    allowed = processors_allowed(limits)
    if allowed is not None and allowed < _processors() and "OMP_NUM_THREADS" not in environment:
        environment.update({"OMP_NUM_THREADS": str(allowed), _OURS: "1"})


def threads_of_each(processes: int, environment: Mapping[str, str] = os.environ, limits: Path = _LIMITS) -> str:
    """Threads of each of several processes that run at a time: the user's number, or an even part, at least 1.

    Args:
        processes: How many there are.
        environment: Variables of the process, after `settle_threads`.
        limits: Where the system keeps a container's limits.
    """
    if environment.get("OMP_NUM_THREADS") and _OURS not in environment:
        return environment["OMP_NUM_THREADS"]
    processors = min(_processors(), processors_allowed(limits) or _processors())
    return str(max(1, processors // processes))


def _processors() -> int:
    """Processors that this process may run on, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processors_allowed(limits: Path = _LIMITS) -> int | None:
    """Processors whose time a container may use, rounded down, at least 1; None where there is no limit.

    Args:
        limits: Where the system keeps a container's limits: `cpu.max` of control groups 2, or `cpu/` of 1.
    """
    older = limits / "cpu"
    words = _words(limits / "cpu.max") or [
        *_words(older / "cpu.cfs_quota_us"),
        *_words(older / "cpu.cfs_period_us"),
    ]
    if len(words) != 2 or not all(word.isdecimal() for word in words) or not int(words[1]):
        return None  # "max", or -1
    return max(1, int(words[0]) // int(words[1]))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return []
