"""Suspect rows of a run, with their texts.

A row's score is its loss above the usual loss of rows of its source at that time, mean over its visits
(`scores.by_row`): at the first visit nothing has been learned from it yet. The source is the column `source`, or the
file (ours): a harder task is no fault of its rows. Repeated rows of a target count as one row.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from siftune.base.errors import DataError
from siftune.base.files import refuse_links
from siftune.data.rows import Row
from siftune.data.target import SOURCE
from siftune.records.again import UnnamedFiles, rows_again
from siftune.records.rows import Text, digest_of, text_of
from siftune.records.scores import Seen, by_row, seen, usual
from siftune.records.visits import NAME, Record, read_visits
from siftune.suspects.twins import Twins

_RARE = 64  # rows of a source; smaller sources are taken together (ours)
LEAST = 3.0  # deviations above the usual loss from which a row is a suspect (ours)


@dataclass(frozen=True)
class Suspect:
    """A row that may be wrong.

    Attributes:
        place: Its place, such as "rows.jsonl:17"; "row 17", its number from 0, if the place is unknown.
        text: Its text; empty without a recipe.
        reason: The reason as text.
        score: Its loss above the usual loss of its source at that time, mean over its visits, in deviations.
        duplicates: Places of near-duplicates.
    """

    place: str
    text: Text
    reason: str
    score: float
    duplicates: tuple[str, ...] = ()


def suspects(run: Path, top: int | None = None, files: Sequence[str] = ()) -> list[Suspect]:
    """Rows of a run that may be wrong, highest scores first.

    Args:
        run: Folder of a run of `siftune train`, or any folder with the `rows.parquet` of `RowRecord`. Texts are read
            again by the run's recipe; without a recipe they are unknown.
        top: At most N rows; None: all whose loss is three deviations above the usual one.
        files: Files to read for texts, if the recipe is not the user's own: see `records.again`.

    Raises:
        InputError: The folder holds a link, which could lead to any file.
        DataError: The run has no record of its rows, or the rows have changed since.
        RecipeError: The run's recipe can't be read.

    Example:
        >>> for suspect in suspects(Path("runs/first"), top=20):  # doctest: +SKIP
        ...     print(suspect.place, suspect.reason)
    """
    return Rows(run, files).suspects(top)


class Rows:
    """Rows of a run, with their record.

    Args:
        run: As for `suspects`.
        files: As for `suspects`.

    Attributes:
        note: The reason why texts are unknown, and a command that shows them; empty if they are known.

    Raises:
        InputError: As `suspects`.
    """

    def __init__(self, run: Path, files: Sequence[str] = ()) -> None:
        refuse_links(run)
        self.record = read_visits(run / NAME)
        self.note = ""
        try:
            rows = rows_of(run, self.record, files)
        except UnnamedFiles as error:
            rows, self.note = [], str(error)
        visits = self.record.visits
        self.texts = texts_of(rows, self.record)
        self.places, self._who = _whereabouts(self.record)
        self._sources = _sources_of(rows, visits.row)
        kinds = np.unique(self._sources, return_inverse=True)[1]
        self._usual = usual(visits.loss, visits.step, kinds)
        self._scores = by_row(self._who, visits.loss, visits.step, kinds)

    def suspects(self, top: int | None = None) -> list[Suspect]:
        """As the function `suspects`."""
        gathered, scores_R = seen(self._who), self._scores
        order = [at for at in np.argsort(-scores_R, kind="stable") if scores_R[at] >= LEAST]  # NaN is not
        return [self._suspect(gathered, int(at)) for at in order[:top]]

    def _suspect(self, gathered: Seen, at: int) -> Suspect:
        place = self.places[gathered.rows[at]]
        text = self.texts.get(place, Text("", ""))
        reason = "; ".join([self._why(np.flatnonzero(self._who == gathered.rows[at])), *self._contradicted(text)])
        return Suspect(place, text, reason, round(float(self._scores[at]), 4), tuple(self._twins_of(place)))

    def _why(self, own: NDArray[np.int64]) -> str:
        """A row's loss as text."""
        visits, source = self.record.visits, self._sources[own[0]]
        cost, was_usual = (float(np.nanmean(values[own])) for values in (visits.loss, self._usual))
        when = f"in step {visits.step[own[0]] + 1}" if len(own) == 1 else f"on average over {len(own)} visits"
        like = f" for rows of {source}" if source else ""
        text = f"loss {cost:.2f} nats per token {when}, where {was_usual:.2f} was usual{like}"
        followed = float(visits.followed[own[0]])
        return text if np.isnan(followed) else f"{text}; {followed:.0%} of the layers followed it at the first visit"

    def _contradicted(self, text: Text) -> list[str]:
        """A row with the same prompt and another completion."""
        asked = self._asked.get(text.prompt, ()) if text.prompt else ()
        other = next((place for place in asked if self.texts[place].completion != text.completion), None)
        return [] if other is None else [f"{other} has the same prompt and another completion"]

    def _twins_of(self, place: str) -> list[str]:
        return [self._known[other] for other in self._twins.of(self._number[place])] if place in self.texts else []

    @cached_property
    def _known(self) -> list[str]:
        return list(self.texts)

    @cached_property
    def _number(self) -> Mapping[str, int]:
        return {place: number for number, place in enumerate(self.texts)}

    @cached_property
    def _twins(self) -> Twins:
        return Twins([f"{text.prompt}\n{text.completion}" for text in self.texts.values()])

    @cached_property
    def _asked(self) -> Mapping[str, list[str]]:
        places: dict[str, list[str]] = {}
        for place, text in self.texts.items():
            places.setdefault(text.prompt, []).append(place)
        return places


def _whereabouts(record: Record) -> tuple[list[str], NDArray[np.int64]]:
    """Places of the rows, and the number of its place for every visit."""
    numbers: dict[str, int] = {}
    who = np.array([numbers.setdefault(place, len(numbers)) for place in _words(record)], dtype=np.int64)
    return list(numbers), who


def _words(record: Record) -> Sequence[str]:
    """Place of each visit's row; its number if the place is unknown."""
    return record.places or [f"row {number}" for number in record.visits.row.tolist()]


def _sources_of(rows: Sequence[Row], row_V: NDArray[np.integer]) -> list[str]:
    """Source of each visit's row; "" for rare or unknown sources, or if all are of one."""
    names = [str(row.extra.get(SOURCE, row.origin.rpartition(":")[0])) for row in rows]
    if len(set(names)) < 2:
        return [""] * len(row_V)
    counts = Counter(names[number] for number in np.unique(row_V))
    return [name if counts[name := names[number]] >= _RARE else "" for number in row_V]


def rows_of(run: Path, record: Record, files: Sequence[str] = ()) -> list[Row]:
    """Rows of a run, by their numbers in its record; none without a recipe.

    Raises:
        UnnamedFiles: The recipe names files that the user has not named.
        DataError: The rows have changed since.
        RecipeError: The recipe can't be read.
    """
    if not (run / "recipe.yaml").is_file():
        return []
    rows = rows_again(run, files)
    if record.about and digest_of(rows) != record.about:
        raise DataError(
            f"the training rows have changed since {run} was trained, so its record does not match: restore them, or "
            "train again."
        )
    return rows


def texts_of(rows: Sequence[Row], record: Record) -> dict[str, Text]:
    """Texts of rows, by their places in the record.

    A row without a visit has its current place, which may be another path of the same file.
    """
    recorded = dict(zip(record.visits.row.tolist(), _words(record), strict=True))
    return {recorded.get(number, row.origin): text_of(row) for number, row in enumerate(rows)}
