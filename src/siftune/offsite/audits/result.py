"""The result of an audit as plain data, and its figures by the scores of the models.

A measure is a score of which more is better: accuracy, or log-likelihood per label token (−nll). In either, with the
conditions' means:

| figure     | formula                                                  | says                                        |
|------------|----------------------------------------------------------|---------------------------------------------|
| Δ          | Plug-in − Emulator FT                                    | above 0: the data owner needs the owner     |
| gain share | (Plug-in − Full ZS) / (Full FT − Full ZS)                | 1: as good as tuning on the base            |
| recovery   | (Recovered − Emulator ZS) / (Full FT − Emulator ZS)      | 1: tuning the whole emulator closes the gap |

Recovered is the best of several learning rates on the held-out rows, as an attacker would choose (`stages.recovered`).

Δ and the five conditions are offsite-tuning's (Xiao et al. 2023) and GradOT's. Gain share, recovery and the use of
log-likelihood as a measure are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from siftune.base.text import jsonable
from siftune.evaluate.bootstrap import Bootstrap, Estimate, Means, accuracy_interval, resample
from siftune.offsite.audits.gradients import GradientCosine
from siftune.offsite.audits.members import RowScores
from siftune.offsite.audits.membership import Membership
from siftune.offsite.audits.models import ParameterShares
from siftune.offsite.audits.settings import AuditSettings

FULL_ZS, FULL_FT = "full_zs", "full_ft"
EMULATOR_ZS, EMULATOR_FT = "emulator_zs", "emulator_ft"
PLUG_IN, RECOVERED = "plug_in", "recovered"

# condition -> what the reader sees
LABELS = {
    FULL_ZS: "Full ZS",
    FULL_FT: "Full FT",
    EMULATOR_ZS: "Emulator ZS",
    EMULATOR_FT: "Emulator FT",
    PLUG_IN: "Plug-in",
    RECOVERED: "Recovered",
}


@dataclass(frozen=True)
class Condition:
    """One model of an audit on the held-out rows."""

    nll: Estimate  # mean negative log-likelihood per label token, in nats
    accuracy: Estimate | None  # share of right rows; None where none was measured
    scores: RowScores  # the same row by row


@dataclass(frozen=True)
class Comparison:
    """The figures of one measure; see the head of this file."""

    delta: Estimate  # Plug-in − Emulator FT; more is better in either measure
    gain_share: Estimate  # Plug-in's share of the gain of Full FT over Full ZS
    # share of the gap from Emulator ZS to Full FT that tuning the whole emulator closes; None where that was not
    # tried
    recovery: Estimate | None


@dataclass(frozen=True)
class RecoveryPoint:
    """The whole emulator, tuned for a while at one learning rate."""

    lr: float  # the peak learning rate
    tokens: int  # tokens of rows that it was tuned on until then, by the rows' mean length
    nll: Estimate  # mean negative log-likelihood per label token of the held-out rows, in nats
    recovery: Estimate  # share of the gap from Emulator ZS to Full FT that is closed, by log-likelihood


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        conditions: Condition -> its scores; the keys of `LABELS`, without `recovered` where that was not tried.
        comparisons: `nll` and, where there is one, `accuracy` -> the figures of that measure.
        accuracy: Which accuracy was measured: `choices`, `exact_match` or None.
        cosine: The outer layers' gradients on base and emulator.
        shares: Fractions of the base's parameters.
        membership: Attacks on the return; None where they were not tried.
        settings: How models were tuned and measured.
        facts: Numbers of rows, versions, names: what the figures depend on besides.
        recovery: The emulator's way to `recovered`, at every learning rate; empty where that was not tried.
    """

    conditions: dict[str, Condition]
    comparisons: dict[str, Comparison]
    accuracy: str | None
    cosine: GradientCosine
    shares: ParameterShares
    membership: Membership | None
    settings: AuditSettings
    facts: dict[str, Any]
    recovery: tuple[RecoveryPoint, ...] = ()

    def to_dict(self, rows: bool = False) -> dict[str, Any]:
        """All of it in plain types for JSON; what is not a finite number is None.

        Args:
            rows: With every condition's scores row by row.
        """
        record: dict[str, Any] = jsonable(self)
        for condition in record["conditions"].values():
            scores = condition.pop("scores")
            condition.update({"rows": scores} if rows else {})
        return record


def summarise(scores: Mapping[str, RowScores], bootstrap: Bootstrap) -> tuple[dict[str, Condition], dict[str, Any]]:
    """Compute conditions, and measure -> `Comparison`, from the models' scores on the same rows, by condition."""
    tokens = scores[FULL_ZS].tokens
    means = {"nll": resample({name: -one.nll for name, one in scores.items()}, tokens, bootstrap)}
    correct = {name: one.correct for name, one in scores.items() if one.correct is not None}
    if correct:
        means["accuracy"] = resample(correct, None, bootstrap)
    conditions = {name: _condition(one, means["nll"].mean(name), bootstrap.level) for name, one in scores.items()}
    return conditions, {measure: _comparison(one) for measure, one in means.items()}


def _condition(scores: RowScores, likelihood: Estimate, level: float) -> Condition:
    accuracy = None
    if scores.correct is not None:
        accuracy = Estimate(float(scores.correct.mean()), *accuracy_interval(scores.correct, level))
    return Condition(negative(likelihood), accuracy, scores)


def _comparison(means: Means) -> Comparison:
    return Comparison(
        delta=means.difference(PLUG_IN, EMULATOR_FT),
        gain_share=means.share(PLUG_IN, FULL_ZS, FULL_FT),
        recovery=means.share(RECOVERED, EMULATOR_ZS, FULL_FT) if RECOVERED in means.point else None,
    )


def negative(estimate: Estimate) -> Estimate:
    """The estimate with the other sign; its interval must be there."""
    assert estimate.value is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return Estimate(-estimate.value, -estimate.high, -estimate.low)
