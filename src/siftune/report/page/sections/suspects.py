"""Rows that may be wrong, with their text: what `siftune rows` names."""

from siftune.base.errors import InputError
from siftune.records.rows import Text
from siftune.records.visits import NAME
from siftune.report.page.figure import slug
from siftune.report.page.section import Cell, Grid, Section
from siftune.report.page.subjects import RunData
from siftune.report.page.words import cut, short
from siftune.suspects.named import suspects as find

_SHOWN = 20
_LONG = 600  # letters of a text


def suspects(run: RunData, several: bool) -> Section | None:
    """The rows that most look wrong; None where the run kept no record of its rows."""
    if not (run.path / NAME).is_file():
        return None
    title = f"Suspect rows{f': {run.name}' if several else ''}"
    anchor = f"suspects-{slug(run.name)}"
    try:
        found = find(run.path, _SHOWN)
    except InputError as error:  # rows that changed since, or a damaged record: the rest of the page stands
        return Section(anchor, title, [f"Not known: {error}"])
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
    words = [f"`siftune rows {run.path}` lists more of them, and writes a file for --drop-rows."]
    return Section(anchor, title, words, tables=[Grid(header, rows, caption, (0, 1, 2, 4), cards=True)])


def _text(text: Text) -> str:
    """Prompt and completion, with an arrow between."""
    return " → ".join(filter(None, (text.prompt.strip(), text.completion.strip())))
