"""Suspect rows of a run, with their texts.

Rows are scored by their loss under the final model (`losses`). Suspects are counted by comparison with decoys of their
source (`rule`): the column `source`, or the file *(ours)*.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from siftune.base.text import counted
from siftune.records.rows import Text, text_of
from siftune.records.visits import NAME, read_visits
from siftune.suspects.losses import kinds_of, read_losses, trained_rows
from siftune.suspects.rule import Scores, judge

_STEPS = 60  # of the run, at least: early, losses of correct rows are as high as those of wrong ones (ours)
_DOUBT = "The losses do not tell which rows are wrong: few or none are, or the model has not learned the task."


@dataclass(frozen=True)
class Suspect:
    """A row that may be wrong.

    Attributes:
        place: Its place, such as "rows.jsonl:17".
        text: Its text.
        reason: The reason as text.
        score: Its loss, summed over label tokens in nats.
    """

    place: str
    text: Text
    reason: str
    score: float


def suspects(run: Path, top: int | None = None, files: Sequence[str] = ()) -> list[Suspect]:
    """Rows of a run that may be wrong, highest scores first.

    Args:
        run: Folder of a run of `siftune train` whose rows are scored, by `siftune rows` or `score_run`.
        top: At most N rows; None: all.
        files: Files of the rows, if the recipe is not the user's own: see `records.again`.

    Returns:
        Rows of which about four fifths are wrong; none if the losses do not tell.

    Raises:
        InputError: The folder holds a link, or its recipe names files that the user has not named.
        DataError: The rows are not scored, or have changed since the run.
        RecipeError: The run's recipe can't be read.

    Example:
        >>> for suspect in suspects(Path("runs/first"), top=20):  # doctest: +SKIP
        ...     print(suspect.place, suspect.reason)
    """
    rows = ScoredRows(run, files)
    return rows.highest(rows.suspects if top is None else min(top, rows.suspects))


class ScoredRows:
    """Scored rows of a run.

    Args:
        run: As for `suspects`.
        files: As for `suspects`.

    Attributes:
        rows: (R,) the rows.
        suspects: Number of suspects; 0 if the losses do not tell.
        doubt: The reason if they do not, as a sentence; else empty.

    Raises:
        InputError: As `suspects`.
    """

    def __init__(self, run: Path, files: Sequence[str] = ()) -> None:
        every, about = trained_rows(run, files)
        losses = read_losses(run, about)
        self._texts = {row.origin: text_of(row) for row in every}
        own = ~losses.decoy & (losses.tokens > 0)
        self.rows = [every[number] for number in losses.row[own]]
        self._loss, self._tokens = losses.loss[own], losses.tokens[own]
        self._sources = kinds_of(self.rows)
        number = {source: kind for kind, source in enumerate(dict.fromkeys(self._sources))}
        kind = {int(row): number[source] for row, source in zip(losses.row[own], self._sources, strict=True)}
        decoys = losses.decoy & np.isin(losses.row, losses.row[own])
        self._verdict = judge(
            *(
                Scores(losses.loss[part], np.array([kind[int(row)] for row in losses.row[part]]), losses.gain[part])
                for part in (own, decoys)
            )
        )
        steps = int(read_visits(run / NAME).visits.step.max(initial=-1)) + 1
        self.suspects = self._verdict.count if steps >= _STEPS else 0
        self.doubt = ""
        if steps < _STEPS:
            took = counted(steps, "step")
            self.doubt = f"The run is too short to tell which rows are wrong: {took}, at least {_STEPS} are needed."
        elif not self.suspects:
            self.doubt = _DOUBT

    def highest(self, count: int) -> list[Suspect]:
        """The N rows with the highest scores, whether or not they are suspect."""
        return [self._suspect(int(at)) for at in self._verdict.order[:count]]

    def _suspect(self, at: int) -> Suspect:
        place, loss, above = self.rows[at].origin, float(self._loss[at]), self._verdict.above[at]
        rows = f"rows of {self._sources[at]}" if self._sources[at] else "rows"
        why = f"loss {loss:.1f} nats, {loss / self._tokens[at]:.2f} per token"
        if not np.isnan(above):
            why += f"; {above:.0%} of the answers swapped between {rows} have a smaller one"
        reason = "; ".join([why, *self._contradicted(place)])
        return Suspect(place, self._texts[place], reason, round(loss, 4))

    def _contradicted(self, place: str) -> list[str]:
        """A row with the same prompt and another completion."""
        prompt, completion = self._texts[place]
        asked = self._asked.get(prompt, ()) if prompt else ()
        other = next((other for other in asked if self._texts[other].completion != completion), None)
        return [] if other is None else [f"{other} has the same prompt and another completion"]

    @cached_property
    def _asked(self) -> Mapping[str, list[str]]:
        places: dict[str, list[str]] = {}
        for place, text in self._texts.items():
            places.setdefault(text.prompt, []).append(place)
        return places
