"""Bootstrap intervals for differences and ratios among several models that were measured on the same rows.

`compare` has the interval of one difference. An audit has many figures of the same models: differences, and ratios of
differences such as a share of a gain. All of them are functions of the models' means, so the rows are drawn once, and
every figure is computed from the same draws (percentile intervals; Efron & Tibshirani 1993, ch. 13).

A ratio whose denominator may be zero has no bounded interval (Fieller, JRSS B 16, 1954). So a ratio here has a value
only where its denominator is above zero, and an interval only where the whole interval of the denominator is (ours).

Shapes: R rows, N resamples, V kinds of rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
_CELLS = 2_000_000  # drawn counts held at a time: 16 MB


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn.

    Attributes:
        resamples: How many times the rows are drawn, with replacement.
        level: Coverage of the intervals, between 0 and 1.
        seed: Seed of the draws.
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
        value: The figure on the rows themselves; None where it is not defined.
        low: Lower bound; None where there is no bounded interval.
        high: Upper bound.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Means:
    """The mean of every model, on the rows themselves and on resampled rows.

    Attributes:
        point: Model -> its mean.
        draws: Model -> (N,) its mean on each resample; a resample has the same rows for every model.
        bootstrap: How they were drawn.
    """

    point: Mapping[str, float]
    draws: Mapping[str, Floats]
    bootstrap: Bootstrap

    def mean(self, name: str) -> Estimate:
        """A model's mean."""
        return Estimate(self.point[name], *self.bootstrap.interval(self.draws[name]))

    def difference(self, a: str, b: str) -> Estimate:
        """A − b."""
        bounds = self.bootstrap.interval(self.draws[a] - self.draws[b])
        return Estimate(self.point[a] - self.point[b], *bounds)

    def share(self, a: str, b: str, whole: str) -> Estimate:
        """(a − b) / (whole − b): how much of the way from b to `whole` a has come."""
        part, all_of_it = self.point[a] - self.point[b], self.point[whole] - self.point[b]
        if all_of_it <= 0:
            return Estimate()
        parts, wholes = self.draws[a] - self.draws[b], self.draws[whole] - self.draws[b]
        if self.bootstrap.interval(wholes)[0] <= 0:
            return Estimate(part / all_of_it)
        defined = wholes != 0
        return Estimate(part / all_of_it, *self.bootstrap.interval(parts[defined] / wholes[defined]))


def resample(
    values: Mapping[str, ArrayLike], weights: ArrayLike | None = None, bootstrap: Bootstrap | None = None
) -> Means:
    """Compute every model's mean Σ values / Σ weights, on the rows and on resamples of them.

    Args:
        values: Model -> (R,) its values, on the same rows in the same order.
        weights: (R,) at least 0 and not all 0, such as numbers of tokens; None for 1 each.
        bootstrap: How to draw.

    Raises:
        ValueError: No models or rows, shapes that differ, or a value that isn't finite.
    """
    bootstrap = bootstrap or Bootstrap()
    columns = {name: np.asarray(column, dtype=np.float64) for name, column in values.items()}
    shapes = {column.shape for column in columns.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 1 or not shape[0]:
        raise ValueError("give one value per row for each model, at least one model and one row")
    weights_R = np.ones(shape) if weights is None else np.asarray(weights, dtype=np.float64)
    _check(columns, weights_R)
    stacked = np.stack([*columns.values(), weights_R])
    chunks = drawn_counts(np.ones(shape[0], dtype=np.int64), bootstrap.resamples, np.random.default_rng(bootstrap.seed))
    *sums, weight = np.concatenate([counts @ stacked.T for counts in chunks]).T
    kept = weight > 0  # a draw of rows without any weight has no mean
    return Means(
        point={name: float(column.sum() / weights_R.sum()) for name, column in columns.items()},
        draws={name: total[kept] / weight[kept] for name, total in zip(columns, sums, strict=True)},
        bootstrap=bootstrap,
    )


def drawn_counts(counts_V: NDArray[np.int64], resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Draw as many rows as there are, with replacement, and count them by kind.

    Args:
        counts_V: How many rows there are of each kind; all ones where every row is a kind of its own.
        resamples: How many times.
        rng: Source of the draws.

    Yields:
        (resamples of this chunk, V) how many rows of each kind were drawn.
    """
    rows = int(counts_V.sum())
    chunk = max(1, _CELLS // len(counts_V))
    for start in range(0, resamples, chunk):
        drawn = rng.multinomial(rows, counts_V / rows, size=min(chunk, resamples - start))
        yield drawn.astype(np.float64)


def _check(columns: Mapping[str, Floats], weights_R: Floats) -> None:
    if any(column.shape != weights_R.shape for column in columns.values()):
        raise ValueError(f"the weights have the shape {weights_R.shape}; give one per row")
    if not all(np.isfinite(column).all() for column in [*columns.values(), weights_R]):
        raise ValueError("values and weights must be finite")
    if (weights_R < 0).any() or not weights_R.any():
        raise ValueError("weights must be at least 0 and not all 0")
