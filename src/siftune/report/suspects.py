"""Suspect rows as a table and as CSV."""

import os
from collections.abc import Sequence

from siftune.base.text import visible
from siftune.data.decisions import Decision, decisions_csv
from siftune.report.table import Table
from siftune.suspects.named import Suspect

_LONGEST = 40  # characters of a text in a table


def table(suspects: Sequence[Suspect], title: str) -> Table:
    """A line for each suspect, long texts cut; the folder of all places stands in the header."""
    folder = _folder([one.place for one in suspects])
    rows = [
        (f"{one.score:.1f}", one.place.removeprefix(folder), *(visible(short(text)) for text in one.text))
        for one in suspects
    ]
    return Table(("score", f"place in {folder}" if folder else "place", "prompt", "completion"), rows, title, (1, 2, 3))


def _folder(places: Sequence[str]) -> str:
    """The folder that all places are in, with a slash at its end; empty for places of data sets of the hub."""
    if not places or not all(map(os.path.isabs, places)):
        return ""
    return os.path.join(os.path.commonpath([os.path.dirname(place) for place in places]), "")


def short(text: str, longest: int = _LONGEST) -> str:
    """A text on one line, without the middle of a long one: the ends matter most.

    Example:
        >>> short("one two three four five", 12)
        'one t … five'
    """
    line = " ".join(text.split())
    if len(line) <= longest:
        return line
    end = (longest - 3) // 2
    return f"{line[: longest - 3 - end]} … {line[-end:]}"


def to_csv(rows: Sequence[Suspect], selected: bool = False) -> str:
    """A decision file (data/decisions.py) of rows with complete texts.

    Args:
        rows: The rows, highest scores first.
        selected: Whether a training takes them: False for suspects, True for rows that only have high losses.
    """
    decisions = (Decision(one.place, selected, [one.score], one.source, *one.text, one.reason) for one in rows)
    return decisions_csv(decisions, with_reason=True)
