"""Membership inference: can it be told from a return which rows it was trained on?

Every row gets a score, the higher the likelier a member. How well the scores tell members from other rows of the same
source is the area under the ROC curve, which is a rank statistic (Mann & Whitney 1947):

    AUC = P(score of a member > score of another) + ½ P(the two are equal)

0.5 is guessing, 1 is certainty. Whoever gets the return can plug it into the base and look at the loss of a candidate:

* *loss-based* (Yeom et al. 2018): score = −nll under the plugged model;
* *reference-based* (difficulty calibration, Watson et al. 2022): score = nll under the base − nll under the plugged
  model, so that rows that any model finds easy do not pass for members.

nll is the mean over a row's label tokens. Both attacks need nothing but base and return. Stronger ones exist, with
shadow models for instance, so a low figure proves no privacy.

Shapes: M members, O others, V distinct scores, N resamples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from siftune.evaluate.bootstrap import Bootstrap, Estimate, Floats, drawn_counts

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Membership:
    """How well members are told from other rows.

    Attributes:
        loss: AUC of the loss-based score.
        reference: AUC of the reference-based score.
        members: Rows that were trained on.
        others: Rows that were not.
        left_out: Held-out rows that stand among the training rows too, token by token; they are on neither side.
    """

    loss: Estimate
    reference: Estimate
    members: int
    others: int
    left_out: int = 0


@dataclass(frozen=True)
class RowLosses:
    """Mean negative log-likelihood per label token of every row, in nats.

    Attributes:
        base: (R,) under the base model.
        plugged: (R,) under the base with the return in it.
    """

    base: Floats
    plugged: Floats


def infer_membership(
    members: RowLosses, others: RowLosses, left_out: int = 0, bootstrap: Bootstrap | None = None
) -> Membership:
    """Measure both attacks.

    Args:
        members: Losses of rows that were trained on, at least one.
        others: Losses of rows of the same source that were not, at least one.
        left_out: See `Membership`.
        bootstrap: How the intervals are drawn.

    Raises:
        ValueError: A side is empty or a loss isn't finite.
    """
    return Membership(
        loss=auc_interval(-members.plugged, -others.plugged, bootstrap),
        reference=auc_interval(members.base - members.plugged, others.base - others.plugged, bootstrap),
        members=len(members.plugged),
        others=len(others.plugged),
        left_out=left_out,
    )


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """Area under the ROC curve by ranks; equal scores count half.

    Args:
        members: (M,) scores, finite.
        others: (O,) scores, finite.

    Raises:
        ValueError: A side is empty or a score isn't finite.
    """
    members_V, others_V = _by_score(members, others)
    return float(_auc(members_V[None].astype(np.float64), others_V[None].astype(np.float64))[0])


def auc_interval(members: ArrayLike, others: ArrayLike, bootstrap: Bootstrap | None = None) -> Estimate:
    """`auc` with its percentile interval; members and others are resampled each among themselves."""
    bootstrap = bootstrap or Bootstrap()
    generators = np.random.default_rng(bootstrap.seed).spawn(2)
    sides = zip(_by_score(members, others), generators, strict=True)
    chunks = zip(*(drawn_counts(counts, bootstrap.resamples, rng) for counts, rng in sides), strict=True)
    draws = np.concatenate([_auc(members_NV, others_NV) for members_NV, others_NV in chunks])
    return Estimate(auc(members, others), *bootstrap.interval(draws))


def _by_score(members: ArrayLike, others: ArrayLike) -> tuple[Counts, Counts]:
    """How many members and others have each distinct score, from the lowest score up: (V,) and (V,)."""
    sides = [np.asarray(scores, dtype=np.float64) for scores in (members, others)]
    if any(scores.ndim != 1 or not scores.size or not np.isfinite(scores).all() for scores in sides):
        raise ValueError("give one finite score per row, at least one member and one other row")
    distinct, place = np.unique(np.concatenate(sides), return_inverse=True)
    places = np.split(place, [sides[0].size])
    members_V, others_V = (np.bincount(part, minlength=len(distinct)) for part in places)
    return members_V, others_V


def _auc(members_NV: Floats, others_NV: Floats) -> Floats:
    """The statistic for each line of counts: (N,)."""
    below_NV = others_NV.cumsum(axis=1) - others_NV / 2  # others of a lower score, and half of those of the same
    wins_N = (members_NV * below_NV).sum(axis=1)
    return np.asarray(wins_N / (members_NV.sum(axis=1) * others_NV.sum(axis=1)))
