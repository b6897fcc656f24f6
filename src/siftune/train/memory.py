"""Peak memory of this process."""

import sys

import torch


def peak_memory_mb() -> float:
    """Peak memory so far, in 10⁶ bytes: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    import resource  # not on Windows, where torch has no peak either

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
