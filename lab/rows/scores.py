"""Scores of a run's rows, larger for rows that are more likely wrong.

    final       loss under the final model, summed over the label tokens, as `siftune rows` has it
    final-mean  … mean over the label tokens
    rule        the order in which `siftune rows` names rows
    loss        mean loss at the first visit
    first       the score of siftune 0.1: loss above the usual loss at that time (`first_sight.py`)
    first-source  … among the rows of the same source

Shapes: R rows.
"""

import numpy as np
from numpy.typing import NDArray

from lab.rows.first_sight import by_row
from siftune.records.visits import Visits
from siftune.suspects.rule import Scores, Verdict

Floats = NDArray[np.float64]


def all_scores(
    visits: Visits,
    losses: Floats,
    tokens: NDArray[np.integer],
    verdict: Verdict,
    kinds: NDArray[np.integer],
) -> dict[str, Floats]:
    """Score all rows; scores of the first visit are NaN for rows without one.

    Args:
        visits: The recorded visits.
        losses: (R,) summed losses under the final model.
        tokens: (R,) label tokens.
        verdict: On these losses.
        kinds: (R,) number of each row's source.
    """
    found = {"final": losses, "final-mean": losses / tokens, "rule": -np.argsort(verdict.order).astype(np.float64)}
    rows, first = np.unique(visits.row, return_index=True)
    ways = {"first": np.zeros(len(visits), dtype=int)}
    if len(np.unique(kinds)) > 1:
        ways["first-source"] = kinds[visits.row]
    old = {name: by_row(visits.row, visits.loss, visits.step, way) for name, way in ways.items()}
    for name, values in {"loss": visits.loss[first].astype(np.float64), **old}.items():
        found[name] = np.full(len(losses), np.nan)
        found[name][rows] = values
    return found


def scores_of(
    losses: Floats,
    kinds: NDArray[np.int64],
    decoys: dict[str, float],
    elsewhere: dict[str, float],
    decoys_elsewhere: dict[str, float],
) -> tuple[Scores, Scores]:
    """Scores of rows and decoys, from losses by number of the row."""
    at = [int(number) for number in decoys]
    gains = np.array([elsewhere.get(str(number), np.nan) for number in range(len(losses))]) - losses
    own = np.array([*decoys.values()])
    decoy_gains = np.array([decoys_elsewhere.get(str(number), np.nan) for number in at]) - own
    return Scores(losses, kinds, gains), Scores(own, kinds[at], decoy_gains)
