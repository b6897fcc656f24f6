"""Section on the rows that sifting selected for a run, with the file of scores that `siftune sift` wrote."""

import csv
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from siftune.base.text import counted, parsed
from siftune.data.target import OTHER
from siftune.report.charts import Chart, Line, line_chart
from siftune.report.parts import Cell, Figure, Grid, Section, slug
from siftune.report.subjects import RunData
from siftune.report.words import percent, short
from siftune.sifting.run import FOLDER, RECORD, SCORES

_EACH = 5  # rows from each part of the order


class _Scored(NamedTuple):
    place: str
    score: float
    after: float
    before: float
    similarity: float
    selected: bool
    source: str
    text: str


def sifted(run: RunData, several: bool) -> Section | None:
    """Selected rows by source, the order of the scores, and rows from it; None for a run that was not sifted."""
    path = run.path / FOLDER / SCORES
    if not path.is_file():
        return None
    title = f"Sifted rows{f': {run.name}' if several else ''}"
    anchor = f"sifted-{slug(run.name)}"
    try:
        rows = sorted(_read(path), key=lambda row: (not row.selected, row.score))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Section(anchor, title, [f"Not available: {path} cannot be read ({error})."])
    count = sum(row.selected for row in rows)
    words = [f"{count:,} of {counted(len(rows), 'row')} of the pool were selected{_why(run.path / FOLDER / RECORD)}."]
    tables = [_by_source(rows)] if {row.source for row in rows} != {OTHER} else []
    return Section(anchor, title, words, [_order(run, rows, count)], [*tables, _examples(rows, count)])


def _why(path: Path) -> str:
    """The reason and the time of a sifting, from its record."""
    try:
        state = parsed(path.read_text(encoding="utf-8"))["state"]
        return f" in {float(state['seconds']):,.0f} s: {state['reason']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _read(path: Path) -> list[_Scored]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            _Scored(
                line["place"],
                _number(line["score"]),
                _number(line["loss_after"]),
                _number(line["loss_before"]),
                _number(line["similarity"]),
                line["selected"] == "1",
                line["source"],
                " → ".join(filter(None, (line["prompt"].strip(), line["completion"].strip()))),
            )
            for line in csv.DictReader(file)
        ]


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _order(run: RunData, rows: list[_Scored], count: int) -> Figure:
    scores = [row.score for row in rows]
    parts = [Line("selected", range(1, count + 1), scores[:count])]
    parts += [Line("left out", range(count + 1, len(rows) + 1), scores[count:], 1)] if count < len(rows) else []
    chart = Chart("change of the loss, nats per token", "rows of the pool: selected, left out, by score")
    return line_chart(f"sifted-{slug(run.name)}", "Scores of the pool", parts, chart)


def _by_source(rows: list[_Scored]) -> Grid:
    pool, selected = Counter(row.source for row in rows), Counter(row.source for row in rows if row.selected)
    lines = [
        [
            Cell(source),
            Cell(f"{number:,}", number),
            Cell(f"{selected[source]:,}", selected[source]),
            Cell(percent(selected[source] / number), selected[source] / number),
        ]
        for source, number in sorted(pool.items(), key=lambda item: -selected[item[0]] / item[1])
    ]
    return Grid(["source", "rows", "selected", "share"], lines, "Selected rows by their column source.")


def _examples(rows: list[_Scored], count: int) -> Grid:
    middle = range(max(0, count - _EACH), min(len(rows), count + _EACH))
    places = sorted({*range(min(_EACH, len(rows))), *middle, *range(max(0, len(rows) - _EACH), len(rows))})
    lines = [
        [
            Cell(f"{place + 1:,}", place),
            Cell(Path(rows[place].place).name, hint=rows[place].place),
            Cell(rows[place].text),
            Cell("selected" if rows[place].selected else "left out", mark="good" if rows[place].selected else "bad"),
            Cell(short(rows[place].score), rows[place].score),
            Cell(f"{short(rows[place].before)} → {short(rows[place].after)}", rows[place].after),
            Cell(short(rows[place].similarity), rows[place].similarity),
        ]
        for place in places
    ]
    header = ["rank", "row", "text", "", "score", "loss before and after", "prompt"]
    caption = (
        "By score: the first and last selected rows, and the first and last that were left out. Prompt: its similarity "
        "to the target's, 1 if equal."
    )
    return Grid(header, lines, caption, (1, 2, 3), cards=True, first=_EACH, unbroken=(1, 5))
