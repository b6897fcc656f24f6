"""Intervals for models measured on the same rows.

The bootstrap draws rows, not results: each resample takes R rows with replacement, and all models are compared on
exactly these. The difficulty of a row, which all share, then cancels. So the interval of a difference is narrower
than that of two separate measurements. Every figure (a mean, a difference, a share of a gain) is a function of the
models' means, so the rows are drawn once and every figure is computed from the same draws. Intervals are percentile
intervals (Efron & Tibshirani, *An Introduction to the Bootstrap*, 1993, ch. 13).

Rows may carry different weight, as numbers of tokens do: a mean is then a ratio of two sums, and both sums are drawn
again in each resample.

A ratio whose denominator may be zero has no bounded interval (Fieller, JRSS B 16, 1954). So a share here has a value
only where its denominator is above zero, and an interval only where the whole interval of the denominator is (ours).

Shapes: R rows, N resamples, C columns (models, and the weights last).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Transform = Callable[[Floats], Floats]
_CELLS = 2_000_000  # drawn numbers held at a time: 16 MB


@dataclass(frozen=True)
class Bootstrap:
    """Settings of the bootstrap.

    Attributes:
        resamples: Number of times that the rows are drawn, with replacement.
        level: Coverage of the intervals, between 0 and 1.
        seed: Seed of the draws; the same seed gives the same intervals.
    """

    resamples: int = 10_000
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.level < 1 or self.resamples < 1:
            raise ValueError(f"level {self.level} must be between 0 and 1, resamples {self.resamples} at least 1")

    def interval(self, draws: Floats) -> tuple[float, float]:
        """Bounds of the percentile interval of (N,) draws."""
        low, high = np.quantile(draws, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval around it.

    Attributes:
        value: The figure on the rows themselves; None if undefined.
        low: Lower bound; None if there is no bounded interval.
        high: Upper bound.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Means:
    """Mean of every model, on the rows themselves and on resampled rows.

    Attributes:
        point: Model -> its mean.
        draws: Model -> (N,) its mean on each resample; a resample has the same rows for every model.
        bootstrap: Settings of the draws.
    """

    point: Mapping[str, float]
    draws: Mapping[str, Floats]
    bootstrap: Bootstrap

    def mean(self, name: str) -> Estimate:
        """Mean of a model."""
        return Estimate(self.point[name], *self.bootstrap.interval(self.draws[name]))

    def difference(self, a: str, b: str, transform: Transform | None = None) -> Estimate:
        """f(a) − f(b); f is the identity if not given."""
        f = transform or (lambda values: values)
        bounds = self.bootstrap.interval(f(self.draws[a]) - f(self.draws[b]))
        points = [f(np.asarray(self.point[name])) for name in (a, b)]
        return Estimate(float(points[0] - points[1]), *bounds)

    def share(self, a: str, b: str, whole: str) -> Estimate:
        """(a − b) / (whole − b): the share of the difference of b and `whole` that a reaches."""
        part, all_of_it = self.point[a] - self.point[b], self.point[whole] - self.point[b]
        if all_of_it <= 0:
            return Estimate()
        parts, wholes = self.draws[a] - self.draws[b], self.draws[whole] - self.draws[b]
        if self.bootstrap.interval(wholes)[0] <= 0:
            return Estimate(part / all_of_it)
        defined = wholes != 0
        return Estimate(part / all_of_it, *self.bootstrap.interval(parts[defined] / wholes[defined]))


def paired_bootstrap(
    base: ArrayLike,
    tuned: ArrayLike,
    bootstrap: Bootstrap | None = None,
    *,
    weights: ArrayLike | None = None,
    transform: Transform | None = None,
) -> Estimate:
    """Bootstrap the difference f(Σ tuned / Σ weights) − f(Σ base / Σ weights) over rows.

    Without weights and transform that's the difference of means, e.g. of accuracies. For perplexity the
    values are the negative log-likelihoods per row, the weights numbers of tokens, the transform `np.exp`.

    Args:
        base: (R,) values of the base model.
        tuned: (R,) values of the tuned model on the same rows in the same order.
        bootstrap: Settings of the draws.
        weights: (R,) at least 0 and not all 0; None for 1 each.
        transform: The function f, applied elementwise; None for the identity.

    Returns:
        The difference on the rows themselves, and its interval.

    Raises:
        ValueError: No rows, shapes that differ, or a value that isn't finite.
    """
    return resample({"base": base, "tuned": tuned}, weights, bootstrap).difference("tuned", "base", transform)


def resample(
    values: Mapping[str, ArrayLike], weights: ArrayLike | None = None, bootstrap: Bootstrap | None = None
) -> Means:
    """Compute every model's mean Σ values / Σ weights, on the rows and on resamples of them.

    Args:
        values: Model -> (R,) its values, on the same rows in the same order.
        weights: (R,) at least 0 and not all 0, such as numbers of tokens; None for 1 each.
        bootstrap: Settings of the draws.

    Raises:
        ValueError: No models or rows, shapes that differ, or a value that isn't finite.
    """
    bootstrap = bootstrap or Bootstrap()
    columns_CR = _columns(values, weights)
    rows, rng = columns_CR.shape[1], np.random.default_rng(bootstrap.seed)
    sums = []
    for size in chunks(bootstrap.resamples, rows):
        rows_NR = rng.integers(0, rows, size=(size, rows))
        sums.append(np.stack([column[rows_NR].sum(axis=1) for column in columns_CR]))
    return _means(list(values), columns_CR, np.concatenate(sums, axis=1), bootstrap)


def chunks(resamples: int, width: int) -> Iterator[int]:
    """Divide resamples of `width` numbers each so that at most 2,000,000 numbers are in memory at a time."""
    chunk = max(1, _CELLS // width)
    for start in range(0, resamples, chunk):
        yield min(chunk, resamples - start)


def _means(names: list[str], columns_CR: Floats, sums_CN: Floats, bootstrap: Bootstrap) -> Means:
    """Means of the models from the sums over rows and over resamples."""
    *totals, whole = columns_CR.sum(axis=1)
    *sums, weight_N = sums_CN[:, sums_CN[-1] > 0]  # a draw of rows without any weight has no mean
    return Means(
        point={name: float(total / whole) for name, total in zip(names, totals, strict=True)},
        draws={name: sum_N / weight_N for name, sum_N in zip(names, sums, strict=True)},
        bootstrap=bootstrap,
    )


def _columns(values: Mapping[str, ArrayLike], weights: ArrayLike | None) -> Floats:
    """Check the values and stack them, the weights last: (C, R) float64."""
    columns = [np.asarray(column, dtype=np.float64) for column in values.values()]
    shapes = list(dict.fromkeys(column.shape for column in columns))
    if len(shapes) != 1 or len(shapes[0]) != 1 or not shapes[0][0]:
        raise ValueError(f"found shapes {shapes}; give one value per row for each model, at least one model and row")
    columns.append(np.ones(shapes[0]) if weights is None else np.asarray(weights, dtype=np.float64))
    if columns[-1].shape != shapes[0]:
        raise ValueError(f"the weights have the shape {columns[-1].shape}; give one per row")
    columns_CR = np.stack(columns)
    if not np.isfinite(columns_CR).all():
        raise ValueError("values and weights must be finite")
    if (columns_CR[-1] < 0).any() or not columns_CR[-1].any():
        raise ValueError("weights must be at least 0 and not all 0")
    return columns_CR


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
