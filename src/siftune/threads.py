"""How torch's threads share the processor, which is settled before torch is loaded.

Left to themselves they fail on a machine that is not theirs alone: a thread that waits for the others turns in circles
and takes the processor from those that it waits for, and where a container may use 2 of 64 processors 64 of them start.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

_LIMITS = Path("/sys/fs/cgroup")
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
    if allowed is not None and allowed < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(allowed))


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
