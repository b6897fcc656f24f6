"""Peak memory of this process."""

import sys
from pathlib import Path

import torch


def peak_memory_mb() -> float:
    """Peak memory so far, in 10⁶ bytes: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # Linux: its ru_maxrss starts at that of the process which started this one
        peak = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if peak is not None:
            return int(peak.split()[1]) * 1024 / 1e6
    import resource  # not on Windows, where torch has no peak either

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6
