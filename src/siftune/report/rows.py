"""Suspect rows as a table, as CSV, and as a page."""

import csv
import html
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


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif }}
body {{ max-width: 76rem; margin: 2rem auto; padding: 0 1rem }}
article {{ border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: .8rem 0 }}
h2 {{ font-size: 1rem; margin: 0; overflow-wrap: anywhere }}
p {{ margin: .2rem 0 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; font: 13px/1.45 ui-monospace, monospace }}
.answer {{ border-left: 3px solid #c2410c; padding-left: .6rem }}
</style>
<h1>{title}</h1>
<p>{note}</p>
{articles}
</html>
"""


def to_html(suspects: Sequence[Suspect], title: str, note: str) -> str:
    """A page of its own with complete texts, all escaped."""
    articles = "\n".join(map(_article, suspects)) or "<p>No row stands out.</p>"
    return _PAGE.format(title=html.escape(title), note=html.escape(note), articles=articles)


def _article(suspect: Suspect) -> str:
    prompt, completion, reason, place = map(html.escape, (*suspect.text, suspect.reason, suspect.place))
    return (
        f'<article><h2>{place}</h2><p>{reason}</p><pre>{prompt}</pre><pre class="answer">{completion}</pre></article>'
    )
