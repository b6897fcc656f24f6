"""Rows that may be wrong, with their text: what `siftune rows` names."""

from siftune.errors import InputError
from siftune.report.page.figure import slug
from siftune.report.page.section import Cell, Grid, Section
from siftune.report.page.subjects import RunData
from siftune.report.page.words import cut, short
from siftune.rows.suspects import Suspect
from siftune.rows.suspects import suspects as find
from siftune.rows.texts import Text

_SHOWN = 20
_LONG = 600  # letters of a text


def suspects(run: RunData, several: bool) -> Section | None:
    """The rows that most look wrong; None where the run kept no record of its rows."""
    found = _found(run)
    if found is None:
        return None
    title = f"Suspect rows{f': {run.name}' if several else ''}"
    anchor = f"suspects-{slug(run.name)}"
    if not found:
        return Section(anchor, title, ["No row stands out."])
    rows = [
        [
            Cell(one.place),
            Cell(cut(_text(one.text), _LONG)),
            Cell(one.reason),
            Cell(short(one.score), one.score),
            Cell(", ".join(map(str, one.duplicates)) or "none"),
        ]
        for one in found
    ]
    caption = f"The {len(rows)} rows that stand out most; right rows can be among them: read before you drop."
    header = ["row", "text", "why", "score", "near-duplicates"]
    words = [f"`siftune rows {run.path}` lists more of them, and writes files for --drop-rows and --row-weights."]
    return Section(anchor, title, words, tables=[Grid(header, rows, caption, (0, 1, 2, 4), cards=True)])


def _found(run: RunData) -> list[Suspect] | None:
    """What stands out; None without a record of rows, or where the rows are no longer what they were."""
    try:
        return find(run.path, _SHOWN)
    except InputError:
        return None


def _text(text: Text) -> str:
    """Prompt and completion, with an arrow between."""
    return " → ".join(filter(None, (text.prompt.strip(), text.completion.strip())))
