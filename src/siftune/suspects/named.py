"""Suspect rows of a run, with their texts and reasons: `rule` on `losses`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from siftune.base.text import one_line
from siftune.data.rows import Text, text_of
from siftune.data.target import source_or_file
from siftune.suspects.decoys import SHARED
from siftune.suspects.losses import read_losses, trained_rows
from siftune.suspects.rule import judge
from siftune.train.folder.run_folder import LOSSES

_LONGEST = 60  # characters of an answer in a reason
_LARGEST = np.log(1e6)  # score that a reason states; larger ones say no more


@dataclass(frozen=True)
class Suspect:
    """A row that may be wrong.

    Attributes:
        place: Its place, such as "rows.jsonl:17".
        text: Its text.
        reason: The reason as text.
        score: Natural logarithm of how many times as well the answer of another row fits its prompt.
        source: Its column `source`, or its file.
    """

    place: str
    text: Text
    reason: str
    score: float
    source: str = ""


def suspects(run: Path, top: int | None = None) -> list[Suspect]:
    """Rows of a run that may be wrong, highest scores first.

    Args:
        run: Folder of a run of `siftune train` whose rows are scored, by `siftune rows` or `score_run`.
        top: At most N rows; None: all.

    Returns:
        Rows of which about four fifths are wrong; none if the losses do not tell.

    Raises:
        InputError: The folder holds a link.
        DataError: The rows are not scored, or have changed since the run.
        RecipeError: The run's recipe can't be read.

    Example:
        >>> for suspect in suspects(Path("runs/rows"), top=20):  # doctest: +SKIP
        ...     print(suspect.place, suspect.reason)
    """
    rows = ScoredRows(run)
    return rows.highest(rows.suspects if top is None else min(top, rows.suspects))


class ScoredRows:
    """Scored rows of a run.

    Args:
        run: As for `suspects`.

    Attributes:
        rows: (R,) the rows.
        suspects: Number of suspects; 0 if the losses do not tell.
        doubt: The reason if they do not, as a sentence; else empty.

    Raises:
        InputError: As `suspects`.
    """

    def __init__(self, run: Path) -> None:
        self._every, about = trained_rows(run)
        self._losses = losses = read_losses(run / LOSSES, about, len(self._every))
        self.rows = [self._every[number] for number in losses.row]
        self._sources = source_or_file(self.rows)
        shared = bool(losses.covered.mean() >= SHARED)
        self._verdict = judge(losses.loss, losses.other_loss, losses.usual, losses.other_usual, shared)
        self.suspects, doubt = self._verdict.count, self._verdict.doubt
        self.doubt = f"No row is suspect: {doubt}." if doubt else ""

    def highest(self, count: int) -> list[Suspect]:
        """The N rows with the highest scores, whether or not they are suspect; rows without a score are left out."""
        scored = [int(at) for at in self._verdict.order if not np.isnan(self._verdict.score[at])]
        return [self._suspect(at) for at in scored[:count]]

    def _suspect(self, at: int) -> Suspect:
        row, score, other = self.rows[at], float(self._verdict.score[at]), self._every[self._losses.other[at]]
        times = np.exp(min(score, _LARGEST))
        answer = one_line(other.completion.strip(), _LONGEST)
        reason = f"“{answer}”, the answer of {other.origin}, fits {times:,.{int(times < 10)}f} times as well"
        return Suspect(row.origin, text_of(row), reason, round(score, 4), self._sources[at])
