"""LISA's draws: layers anywhere or neighbours, each time anew or in turn.

    scattered            γ of the L layers, without replacement (the paper's)
    window, upper        layers s … s+γ−1, s uniform over a … L−γ; a = 0, or ⌊L/2⌋ for the upper half
    … in turn            s from a, a+γ, a+2γ, …, and L−γ at last, which may overlap with the one below it

Symbols: L `layers`, γ `count`, a `first`, s a start. Layers at the edge of where windows may lie are in fewer windows
than those in the middle; in turn all are visited as often, but for an overlap.

*In turn* is a round in random order. Where a round has too few left for a draw, these come, and what is missing comes
from the next round: no two layers (or windows) have visits that differ by more than one.

All but the first line is ours.
"""

from collections.abc import Sequence

import torch


def window_starts(first: int, layers: int, count: int, in_turn: bool) -> list[int]:
    """Positions at which a window of `count` layers may start; in turn, windows that cover all from `first` on.

    Args:
        first: Lowest layer that a window may hold.
        layers: Layers there are.
        count: Layers in a window, at most layers − first.
        in_turn: Side by side; else every position.
    """
    return [*range(first, layers - count, count if in_turn else 1), layers - count]


def deal(
    waiting: Sequence[int], everyone: Sequence[int], count: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Take the next `count` of a round in random order, and begin another round where it ends.

    Args:
        waiting: Those of the round that have not come yet, in their order.
        everyone: All there are, each once.
        count: How many to take, 1 ≤ count ≤ len(everyone).
        generator: Source of randomness, on the CPU.

    Returns:
        Those that come, each once, and those that wait then.
    """
    last, rest = list(waiting[:count]), list(waiting[count:])
    if len(last) == count:
        return last, rest
    order = [everyone[at] for at in torch.randperm(len(everyone), generator=generator).tolist()]
    new = [one for one in order if one not in last][: count - len(last)]
    return last + new, [one for one in order if one not in new]  # those who ended the last round are yet to come
