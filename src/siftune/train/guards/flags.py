"""Conditions of a step that all ranks act on if they hold on one, in one exchange a step (ours)."""

from collections.abc import Callable, Sequence

import torch

from siftune.base.ranks import mean_over_ranks, world_size


class Flag:
    """A condition that each rank checks, and on which all ranks act together.

    With one rank it is true as long as the condition holds. With several it has the value of the last `exchange`.

    Args:
        condition: Whether the condition holds on this rank.

    Example:
        >>> seconds = 3
        >>> late = Flag(lambda: seconds > 2)
        >>> bool(late)
        True
    """

    def __init__(self, condition: Callable[[], bool]) -> None:
        self.condition = condition
        self.agreed = False

    def __bool__(self) -> bool:
        return self.condition() if world_size() == 1 else self.agreed


def exchange(flags: Sequence[Flag], device: torch.device) -> None:
    """Set each flag on all ranks if its condition holds on any of them; `device` is the model's."""
    if world_size() > 1:
        own = torch.tensor([float(flag.condition()) for flag in flags], dtype=torch.float64)
        for flag, share in zip(flags, mean_over_ranks(own, device).tolist(), strict=True):
            flag.agreed = share > 0
