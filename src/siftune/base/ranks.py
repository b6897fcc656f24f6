"""What a launcher has told this process of its place among others, without torch.

torchrun, `accelerate launch` and `siftune train --processes` set the same variables.
"""

import os

TOLD_BY_PARENT = "SIFTUNE_TOLD_BY_PARENT"  # set where the process that started this one says why it failed
LEFT_ALONE = "another process of the run ended, and this one cannot continue without it"


def launch_size() -> int:
    """Processes of the launch; 1 where this process is on its own."""
    return _number("WORLD_SIZE", 1)


def launch_rank() -> int:
    """Number of this process among them, from 0."""
    return _number("RANK", 0) if launch_size() > 1 else 0


def told_by_parent() -> bool:
    """Whether another process says why this one failed."""
    return TOLD_BY_PARENT in os.environ


def _number(name: str, usual: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else usual
