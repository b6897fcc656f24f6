"""The order in which a run meets its rows: a target's in the last part of the steps, the others from the start; ours.

As the decay phase of MiniCPM (arXiv 2404.06395) ends pretraining on the data that counts. Whether it is better than to
have them come all along was measured (docs/measured.md); why, was not.

With D rows in an epoch, of which the share p are the target's, N rows in the whole run and the last part f of it:

    target     round(p N) draws, all of them in the last max(f, p) N
    others     the other draws, the same number as if rows came as they are

Each kind is gone through again and again in random order: no row comes twice before all others of its kind have come.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

Places = np.ndarray[tuple[int], np.dtype[np.int64]]


class TargetLast(Sampler[int]):
    """Draws an epoch's rows, of a run in which a target's come last.

    Args:
        aimed: Which rows are the target's, (D,) bool; some are, and some are not.
        draws: N, rows that the run draws from first to last, in however many epochs.
        last: f, share of the run in which the target's rows come, above 0.
        seed: Of the order.

    Example:
        >>> order = TargetLast([False] * 6 + [True] * 2, draws=16, last=0.25, seed=0)
        >>> order.set_epoch(0)
        >>> sorted(order)
        [0, 0, 1, 1, 2, 3, 4, 5]
    """

    def __init__(self, aimed: Sequence[bool], draws: int, last: float, seed: int) -> None:
        self._size = len(aimed)
        self._order = order_of_run(np.asarray(aimed, dtype=bool), draws, last, seed)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        begin = self._epoch * self._size
        return iter(self._order[begin : begin + self._size].tolist())


def order_of_run(aimed_D: np.ndarray[tuple[int], np.dtype[np.bool_]], draws: int, last: float, seed: int) -> Places:
    """Places of the rows in the order in which a run draws them; as `TargetLast`.

    Returns:
        (E D,) int64 in the E epochs that N draws begin: after the N come rows of both kinds.
    """
    randomness = np.random.default_rng(seed)
    target_places, other_places = np.flatnonzero(aimed_D), np.flatnonzero(~aimed_D)
    of_target = round(draws * len(target_places) / len(aimed_D))
    early = draws - max(round(draws * last), of_target)
    others = _again(other_places, draws - of_target, randomness)
    late = randomness.permutation(np.concatenate([others[early:], _again(target_places, of_target, randomness)]))
    beyond = _again(np.arange(len(aimed_D)), -draws % len(aimed_D), randomness)
    return np.concatenate([others[:early], late, beyond])


def _again(places: Places, count: int, randomness: np.random.Generator) -> Places:
    """Go through places in random order, again and again, until there are `count`."""
    passes = [randomness.permutation(places) for _ in range(-(-count // len(places)))]
    return np.concatenate([*passes, np.empty(0, dtype=np.int64)])[:count]
