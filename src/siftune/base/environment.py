"""The process and its machine: versions, hardware, memory, ranks of a launch, threads, and loggers of other libraries.

Nothing here imports torch at once: threads are settled before torch is loaded. A thread of its OpenMP that waits for
others spins and takes the processor from them, and in a container with 2 of 64 processors 64 threads would start.
"""

import errno
import logging
import os
import platform
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("siftune", "torch", "transformers", "peft", "accelerate", "datasets")

ABOUT = (
    "siftune fine-tunes language models on messy data: a few correct rows of your task show which others to train on."
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def hardware() -> str:
    """The machine as text: its accelerators, or its processor and the threads in use."""
    import torch

    if not torch.accelerator.is_available():
        return f"{_processor()}, {torch.get_num_threads()} threads"
    count, name = torch.accelerator.device_count(), str(torch.accelerator.current_accelerator())
    name = getattr(torch.get_device_module(), "get_device_name", lambda: name)()
    return f"{count} × {name}" if count > 1 else name


def _processor() -> str:
    """The processor's name, if the system states it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"


def reset_peak_memory() -> None:
    """Begin to measure `peak_memory_mb` anew, as far as the system allows it."""
    import torch

    if torch.accelerator.is_available():
        reset = getattr(_memory_functions(), "reset_peak_memory_stats", None)
        for index in range(torch.accelerator.device_count()):
            if reset is not None:
                reset(index)
    with suppress(OSError):  # Linux; other systems keep the peak of the process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_mb() -> float:
    """Peak memory since `reset_peak_memory`, in 10⁶ bytes: allocated on all accelerators, else resident.

    Without counts of its allocator, as of Apple's, an accelerator counts as none.
    """
    import torch

    if torch.accelerator.is_available():
        peak = getattr(_memory_functions(), "max_memory_allocated", lambda index: 0)
        allocated = sum(peak(index) for index in range(torch.accelerator.device_count()))
        if allocated:
            return float(allocated) / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # Linux: its ru_maxrss starts at that of the process which started this one
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024 / 1e6
    import resource  # not on Windows, where torch has no peak either

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6


def _memory_functions() -> Any:
    """Torch's functions for the memory of accelerators, or, in older versions, those of the accelerator at hand."""
    import torch

    return torch.accelerator if hasattr(torch.accelerator, "max_memory_allocated") else torch.get_device_module()


def synchronize() -> None:
    """Wait for all accelerators, so that time can be measured."""
    import torch

    if torch.accelerator.is_available():
        for index in range(torch.accelerator.device_count()):
            torch.accelerator.synchronize(index)


def empty_cache() -> None:
    """Return the accelerators' unused memory to the system."""
    import torch

    if torch.accelerator.is_available():
        getattr(torch.get_device_module(), "empty_cache", lambda: None)()


# what other errors than MemoryError and torch's OutOfMemoryError say
_NO_MEMORY = (
    "can't allocate memory",  # torch's allocator on processors
    "std::bad_alloc",
    f"(os error {errno.ENOMEM})",  # safetensors
    "out of memory",  # CUDA error, MPS backend, XPU, NPU
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)


def ran_out(error: BaseException) -> bool:
    """Whether an error is a failed allocation of a device or the machine."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return getattr(error, "errno", None) == errno.ENOMEM or any(text in str(error) for text in _NO_MEMORY)


# --- ranks of a launch: torchrun and `accelerate launch` set the same variables ---


def launch_size() -> int:
    """Processes of the launch; 1 where this process is on its own."""
    return _number("WORLD_SIZE", 1)


def launch_rank() -> int:
    """Number of this process among them, from 0."""
    return _number("RANK", 0) if launch_size() > 1 else 0


def _number(name: str, usual: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else usual


# --- threads ---

_LIMITS = Path("/sys/fs/cgroup")
_TURNS = "1000"  # checks of a waiting thread before it sleeps; GNU's OpenMP makes some 300,000


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
        environment["OMP_NUM_THREADS"] = str(allowed)


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
    words = _fields(limits / "cpu.max") or [
        *_fields(older / "cpu.cfs_quota_us"),
        *_fields(older / "cpu.cfs_period_us"),
    ]
    if len(words) != 2 or not all(word.isdecimal() for word in words) or not int(words[1]):
        return None  # "max", or -1
    return max(1, int(words[0]) // int(words[1]))


def _fields(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return []


# --- loggers of other libraries ---


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Let loggers tell errors alone while a block runs.

    Example:
        >>> with quiet("some.library"):
        ...     logging.getLogger("some.library").isEnabledFor(logging.WARNING)
        False
        >>> logging.getLogger("some.library").isEnabledFor(logging.WARNING)
        True
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def unsaid(name: str, beginning: str) -> Iterator[None]:
    """Keep a logger from telling one thing while a block runs: messages that begin so.

    Example:
        >>> with unsaid("some.library", "All is lost"):
        ...     logging.getLogger("some.library").warning("All is lost: nothing of yours")
    """
    logger, keep = logging.getLogger(name), partial(_begins_otherwise, beginning)
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _begins_otherwise(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)
