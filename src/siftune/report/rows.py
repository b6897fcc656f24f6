"""Suspect rows as a table and as CSV."""

import csv
import io
from collections.abc import Sequence

from siftune.base.text import inert, visible
from siftune.report.table import Table
from siftune.suspects.named import Suspect

HEADER = ("place", "score", "prompt", "completion", "reason")
_LONGEST = 40  # characters of a text in a table


def table(suspects: Sequence[Suspect], title: str) -> Table:
    """A line for each suspect, long texts cut."""
    rows = [
        (f"{one.score:.1f}", one.place, visible(short(one.text.prompt)), visible(short(one.text.completion)))
        for one in suspects
    ]
    return Table(("score", "place", "prompt", "completion"), rows, title, words=(1, 2, 3))


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


def to_csv(suspects: Sequence[Suspect]) -> str:
    """All suspects with complete texts; `train --drop-rows` takes the file.

    A text that begins like a formula gets an apostrophe in front, so that no spreadsheet computes what is in a row.
    """
    box = io.StringIO()
    writer = csv.writer(box, lineterminator="\n")
    writer.writerow(HEADER)
    for each in suspects:
        texts = map(inert, (each.text.prompt, each.text.completion, each.reason))
        writer.writerow([each.place, each.score, *texts])
    return box.getvalue()
