"""Membership inference: can it be told from a return which rows it was trained on?

Every row gets a score, the higher the likelier a member. How well the scores tell members from other rows of the same
source is measured in two ways. The area under the ROC curve is a rank statistic (Mann & Whitney 1947):

    AUC = P(score of a member > score of another) + ½ P(the two are equal)

0.5 is guessing, 1 is certainty. An attack that is sure of a few rows harms these, whatever its AUC; so beside it stands
the share of members that it finds while it takes at most a share α of the others for members (Carlini et al. 2022):

    TPR at α = P(score of a member > τ),   τ the least score with  P(score of another > τ) ≤ α

Guessing finds α of them. With O others, τ cannot be told for an α below 1/O: such a figure allows no false alarm at
all, and is marked as not resolved.

Whoever gets the return can plug it into the base and look at the loss of a candidate:

* *loss-based* (Yeom et al. 2018): score = −nll under the plugged model;
* *reference-based* (difficulty calibration, Watson et al. 2022): score = nll under the base − nll under the plugged
  model, so that rows that any model finds easy do not pass for members;
* *shadow models* (`lira.py`).

nll is the mean over a row's label tokens. *Blind* is no attack: score = −nll under the base, which has seen no row.
Where it tells the sides apart, members and others differ by source, and every other figure is too high or too low
(blind baselines, Das et al. 2024, arXiv 2406.16201).

Shapes: M members, O others, V distinct scores, N resamples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from siftune.evaluate.bootstrap import Bootstrap, Estimate, Floats, chunks

Counts = NDArray[np.int64]

RATES = (0.01, 0.05)  # shares of false alarms at which attacks are read


@dataclass(frozen=True)
class Attack:
    """Success of an attack: members against others."""

    auc: Estimate
    tpr_1: Estimate  # share of members found at 1 % false alarms
    tpr_5: Estimate  # the same at 5 %
    members: int
    others: int  # fewer than 100 do not resolve 1 %, fewer than 20 not 5 %

    def resolves(self, rate: float) -> bool:
        """Whether the others are enough for a share of false alarms."""
        return self.others * rate >= 1 - 1e-9

    @property
    def tells_apart(self) -> bool:
        """Whether the AUC's interval leaves 0.5 out, on either side."""
        assert self.auc.low is not None
        assert self.auc.high is not None
        return self.auc.low > 0.5 or self.auc.high < 0.5


@dataclass(frozen=True)
class Membership:
    """Success of all attacks on membership."""

    loss: Attack
    reference: Attack
    blind: Attack  # no attack: the base's loss alone. If it tells the sides apart, they differ by source
    members: int  # rows that were trained on
    others: int  # rows that were not
    left_out: int = 0  # held-out rows that stand among the training rows too, token by token; they are on neither side
    # LiRA with shadow models that were and others that were not trained on a row; None where not tried
    online: Attack | None = None
    shadows: int = 0


@dataclass(frozen=True)
class RowLosses:
    """Mean negative log-likelihood per label token of every row, in nats."""

    base: Floats  # (R,) under the base model
    plugged: Floats  # (R,) under the base with the return in it


def infer_membership(
    members: RowLosses, others: RowLosses, left_out: int = 0, bootstrap: Bootstrap | None = None
) -> Membership:
    """Measure the attacks that need no model but base and return; see `Membership` for `left_out`.

    Raises:
        ValueError: A side is empty or a loss isn't finite.
    """
    return Membership(
        loss=measure_attack(-members.plugged, -others.plugged, bootstrap),
        reference=measure_attack(members.base - members.plugged, others.base - others.plugged, bootstrap),
        blind=measure_attack(-members.base, -others.base, bootstrap),
        members=len(members.plugged),
        others=len(others.plugged),
        left_out=left_out,
    )


def measure_attack(members: ArrayLike, others: ArrayLike, bootstrap: Bootstrap | None = None) -> Attack:
    """Measure scores of any attack, with percentile intervals; each side is resampled among itself.

    Args:
        members: (M,) scores, finite; the higher the likelier a member.
        others: (O,) scores, finite.
        bootstrap: How the intervals are drawn.

    Raises:
        ValueError: A side is empty or a score isn't finite.

    Example:
        >>> found = measure_attack([3.0, 1.0], [0.0, 0.5], Bootstrap(100))
        >>> found.auc.value, found.tpr_1.value, found.resolves(0.01)
        (1.0, 1.0, False)
    """
    bootstrap = bootstrap or Bootstrap()
    sides = _by_score(members, others)
    point = np.concatenate(_figures(*(side[None].astype(np.float64) for side in sides)))
    generators = np.random.default_rng(bootstrap.seed).spawn(2)
    drawn = (_drawn(side, bootstrap.resamples, rng) for side, rng in zip(sides, generators, strict=True))
    draws = np.concatenate([np.stack(_figures(*pair), axis=1) for pair in zip(*drawn, strict=True)])
    area, first, second = (Estimate(float(p), *bootstrap.interval(d)) for p, d in zip(point, draws.T, strict=True))
    return Attack(area, first, second, int(sides[0].sum()), int(sides[1].sum()))


def _by_score(members: ArrayLike, others: ArrayLike) -> tuple[Counts, Counts]:
    """Numbers of members and others of each distinct score, from the lowest score up: (V,) and (V,)."""
    sides = [np.asarray(scores, dtype=np.float64) for scores in (members, others)]
    if any(scores.ndim != 1 or not scores.size or not np.isfinite(scores).all() for scores in sides):
        raise ValueError("give one finite score per row, at least one member and one other row")
    distinct, place = np.unique(np.concatenate(sides), return_inverse=True)
    places = np.split(place, [sides[0].size])
    members_V, others_V = (np.bincount(part, minlength=len(distinct)) for part in places)
    return members_V, others_V


def _drawn(counts_V: Counts, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Draw all rows of a side with replacement, and count them by score: (resamples of this chunk, V)."""
    rows = int(counts_V.sum())
    for size in chunks(resamples, len(counts_V)):
        yield rng.multinomial(rows, counts_V / rows, size=size).astype(np.float64)


def auc(members_NV: Floats, others_NV: Floats) -> Floats:
    """Area under the ROC curve by ranks, for each line of counts; equal scores count half: (N,)."""
    below_NV = others_NV.cumsum(axis=1) - others_NV / 2  # others of a lower score, and half of those of the same
    wins_N = (members_NV * below_NV).sum(axis=1)
    return np.asarray(wins_N / (members_NV.sum(axis=1) * others_NV.sum(axis=1)))


def tpr(members_NV: Floats, others_NV: Floats, rate: float) -> Floats:
    """Share of members above the least score that at most a share `rate` of the others exceed, by line: (N,)."""
    allowed_N1 = rate * others_NV.sum(axis=1, keepdims=True) + 1e-9
    above_NV = others_NV.sum(axis=1, keepdims=True) - others_NV.cumsum(axis=1)  # others of a higher score
    # A score is above τ if all others of its own score and higher ones are allowed.
    found_N = (members_NV * (above_NV + others_NV <= allowed_N1)).sum(axis=1)
    return np.asarray(found_N / members_NV.sum(axis=1))


def _figures(members_NV: Floats, others_NV: Floats) -> tuple[Floats, ...]:
    """AUC and the shares found, for each line of counts: (N,) each."""
    return auc(members_NV, others_NV), *(tpr(members_NV, others_NV, rate) for rate in RATES)
