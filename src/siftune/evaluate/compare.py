"""Intervals for differences between two models that were measured on the same rows.

The paired bootstrap draws rows, not results: each resample takes R rows with replacement and compares both
models on exactly these. What makes a row hard for both then cancels, so the interval is narrower than that of
two separate measurements. The interval is the percentile interval (Efron & Tibshirani, *An Introduction to
the Bootstrap*, 1993, ch. 13) of the difference.

Rows of a metric like perplexity carry different weight: it's a function of a ratio of two sums, and both sums
are drawn again in each resample.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
_CELLS = 2_000_000  # drawn indices held at a time: 16 MB


@dataclass(frozen=True)
class Interval:
    """A difference tuned − base and the interval around it."""

    difference: float
    low: float
    high: float


def paired_bootstrap(
    base: ArrayLike,
    tuned: ArrayLike,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
    *,
    weights: ArrayLike | None = None,
    transform: Callable[[Floats], Floats] | None = None,
) -> Interval:
    """Bootstrap the difference f(Σ tuned / Σ weights) − f(Σ base / Σ weights) over rows.

    Without weights and transform that's the difference of means, e.g. of accuracies. For perplexity the
    values are the negative log-likelihoods per row, the weights numbers of tokens, the transform `np.exp`.

    Args:
        base: (R,) values of the base model.
        tuned: (R,) values of the tuned model on the same rows in the same order.
        resamples: How many times R rows are drawn.
        level: Coverage of the interval, between 0 and 1.
        seed: Seed of the draw; the same seed gives the same interval.
        weights: (R,) at least 0 and not all 0; None for 1 each.
        transform: The function f, applied elementwise; None for the identity.

    Returns:
        The difference on the rows themselves, and the bounds of its percentile interval.

    Raises:
        ValueError: No rows, shapes that differ, a value that isn't finite, or an argument out of range.
    """
    columns_3R = _columns(base, tuned, weights)
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level {level} must be between 0 and 1, resamples {resamples} at least 1")
    apply = transform or (lambda ratio: ratio)
    rng = np.random.default_rng(seed)
    sums = np.concatenate(list(_resampled_sums(columns_3R, resamples, rng)), axis=1)
    # A draw of rows without any weight has no ratio.
    draws = _difference(sums[:, sums[2] > 0], apply)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(_difference(columns_3R.sum(axis=1), apply)), float(low), float(high))


def accuracy_interval(correct: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion; it stays within [0, 1] and works at 0 % and 100 %.

    Args:
        correct: (R,) bool, whether each row is right.
        level: Coverage, between 0 and 1.

    Returns:
        The lower and the upper bound.

    Raises:
        ValueError: There are no rows, or the level is out of range.

    Source: E. B. Wilson, JASA 22 (1927) 209–212.
    """
    right = np.asarray(correct, dtype=np.float64)
    if right.ndim != 1 or not right.size or not 0 < level < 1:
        raise ValueError(f"found shape {right.shape} and level {level}; give one row or more, a level in (0, 1)")
    n, rate = right.size, float(right.mean())
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)))
    return max(0.0, centre - half), min(1.0, centre + half)


def _columns(base: ArrayLike, tuned: ArrayLike, weights: ArrayLike | None) -> Floats:
    """Check the values and stack base, tuned and weights: (3, R) float64."""
    arrays = [np.asarray(values, dtype=np.float64) for values in (base, tuned)]
    arrays.append(np.ones_like(arrays[0]) if weights is None else np.asarray(weights, dtype=np.float64))
    shapes = [array.shape for array in arrays]
    if arrays[0].ndim != 1 or not arrays[0].size or len(set(shapes)) != 1:
        raise ValueError(f"base, tuned and weights have shapes {shapes}; give one value per row, at least one row")
    columns_3R = np.stack(arrays)
    if not np.isfinite(columns_3R).all() or (columns_3R[2] < 0).any() or not columns_3R[2].any():
        raise ValueError("values must be finite, weights at least 0 and not all 0")
    return columns_3R


def _resampled_sums(columns_3R: Floats, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield the sums of base, tuned and weights over drawn rows: (3, resamples of this chunk)."""
    rows = columns_3R.shape[1]
    chunk = max(1, _CELLS // rows)
    for start in range(0, resamples, chunk):
        drawn = rng.integers(0, rows, size=(min(chunk, resamples - start), rows))
        yield np.stack([column[drawn].sum(axis=1) for column in columns_3R])


def _difference(sums: Floats, apply: Callable[[Floats], Floats]) -> Floats:
    """f(tuned / weight) − f(base / weight) from the three sums."""
    base, tuned, weight = sums
    return apply(tuned / weight) - apply(base / weight)
