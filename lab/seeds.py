"""Means of methods over the same seeds, with bootstrap intervals over seeds and questions.

A resample draws as many seeds as there are, with replacement, and for each of these draws as many of its questions as
it has, with replacement. All methods are compared on exactly the same questions of the same seeds, whatever these are.

A seed that is drawn k times has k·R of its R questions drawn, which is one multinomial draw.

Shapes: N resamples, S seeds, R questions of a seed, C methods.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from siftune.evaluate.bootstrap import Bootstrap, Means

Floats = NDArray[np.float64]

BOOTSTRAP = Bootstrap(resamples=4000)


def seed_means(
    values: Mapping[str, Sequence[Sequence[float]]],
    weights: Sequence[Sequence[float]],
    bootstrap: Bootstrap = BOOTSTRAP,
) -> Means:
    """Compute every method's mean Σ values / Σ weights over seeds and questions.

    Args:
        values: Method -> seed by seed the values of its questions.
        weights: Seed by seed the weights of the questions, such as numbers of tokens.
        bootstrap: How to draw.

    Raises:
        ValueError: A method has other seeds or other numbers of questions than there are weights.
    """
    sizes = tuple(len(each) for each in weights)
    for name, seeds in values.items():
        if tuple(len(each) for each in seeds) != sizes:
            raise ValueError(f"{name} has {[len(each) for each in seeds]} questions by seed, but weights {sizes}")
    counts = _drawn(sizes, bootstrap)
    columns = [np.array([*(values[name][seed] for name in values), weights[seed]]) for seed in range(len(sizes))]
    totals_C = np.sum([column.sum(axis=1) for column in columns], axis=0)
    sums_NC = np.sum([count_NR @ column.T for count_NR, column in zip(counts, columns, strict=True)], axis=0)
    return Means(
        point={name: float(total / totals_C[-1]) for name, total in zip(values, totals_C, strict=False)},
        draws={name: sum_N / sums_NC[:, -1] for name, sum_N in zip(values, sums_NC.T, strict=False)},
        bootstrap=bootstrap,
    )


@lru_cache(maxsize=8)
def _drawn(sizes: tuple[int, ...], bootstrap: Bootstrap) -> list[Floats]:
    """How often each question counts in each resample: for every seed (N, R)."""
    rng = np.random.default_rng(bootstrap.seed)
    even = np.full(len(sizes), 1 / len(sizes))
    times_NS = rng.multinomial(len(sizes), even, size=bootstrap.resamples)
    pairs = zip(times_NS.T, sizes, strict=True)
    return [rng.multinomial(times_N * size, np.full(size, 1 / size)).astype(np.float64) for times_N, size in pairs]
