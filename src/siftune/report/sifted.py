"""Sections on the rows that sifting selected and left out for a run, with the files of scores that it wrote."""

import csv
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from siftune.base.text import counted, parsed
from siftune.report.charts import Chart, Line, line_chart
from siftune.report.parts import Cell, Figure, Grid, Section, slug
from siftune.report.subjects import RunData
from siftune.report.words import percent, short
from siftune.sifting.run import RECORD, SCORES
from siftune.sifting.scoring import AVOID
from siftune.train.folder.run import SIFT

_EACH = 5  # rows from each part of the order


class _Scored(NamedTuple):
    place: str
    score: float
    after: float
    before: float
    similarity: float | None
    selected: bool
    source: str
    text: str


def sifted(run: RunData, several: bool) -> Section | None:
    """Selected rows by source, the order of the scores, and rows from it; None for a run without a target's scores."""
    read = _rows(run, several, run.path / SIFT / SCORES, "Sifted rows", "sifted")
    if not isinstance(read, _Part):
        return read
    rows = sorted(read.rows, key=lambda row: (not row.selected, row.score))
    count = sum(row.selected for row in rows)
    words = [f"{count:,} of {counted(len(rows), 'row')} of the pool were selected{_why(run.path / SIFT / RECORD)}."]
    tables = [_by_source(rows)] if len({row.source for row in rows}) > 1 else []
    chart = Chart("change of the loss, nats per token", "rows of the pool: selected, left out, by score")
    caption = (
        "By score: the first and last selected rows, and the first and last that were left out. Prompt: its similarity "
        "to the target's, 1 if equal."
    )
    names = ("selected", "left out")
    return read.section(words, _order(read, rows, count, names, chart), [*tables, _examples(rows, count, caption)])


def avoided(run: RunData, several: bool) -> Section | None:
    """The order of the scores by the bad rows, and rows from it; None for a run without `--avoid`."""
    read = _rows(run, several, run.path / SIFT / AVOID / SCORES, "Rows like the bad ones", "avoided")
    if not isinstance(read, _Part):
        return read
    rows = sorted(read.rows, key=lambda row: (row.selected, row.score))
    count = sum(not row.selected for row in rows)
    why = "" if (run.path / SIFT / SCORES).is_file() else _why(run.path / SIFT / RECORD)
    words = [f"{count:,} of {counted(len(rows), 'row')} of the pool were left out{why}."]
    chart = Chart("change of the loss by the bad rows, nats per token", "rows of the pool: left out, others, by score")
    caption = "By score: the first and last rows that were left out, and the first and last of the others."
    names = ("left out", "not like the bad rows")
    return read.section(words, _order(read, rows, count, names, chart), [_examples(rows, count, caption)])


class _Part(NamedTuple):
    anchor: str
    title: str
    rows: list[_Scored]

    def section(self, words: list[str], figure: Figure, tables: list[Grid]) -> Section:
        return Section(self.anchor, self.title, words, [figure], tables)


def _rows(run: RunData, several: bool, path: Path, title: str, name: str) -> Section | _Part | None:
    """The rows of a file of scores; a section that says why not if it cannot be read, and None if there is none."""
    if not path.is_file():
        return None
    part = _Part(f"{name}-{slug(run.name)}", f"{title}: {run.name}" if several else title, [])
    try:
        return part._replace(rows=_read(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Section(part.anchor, part.title, [f"Not available: {path} cannot be read ({error})."])


def _why(path: Path) -> str:
    """The reason and the time of a sifting, from its record."""
    try:
        state = parsed(path.read_text(encoding="utf-8"))["state"]
        return f" in {float(state['seconds']):,.0f} s: {state['reason']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _read(path: Path) -> list[_Scored]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [
            _Scored(
                line["place"],
                _number(line["score"]),
                _number(line["loss_after"]),
                _number(line["loss_before"]),
                _number(line["similarity"]) if "similarity" in line else None,
                line["selected"] == "1",
                line["source"],
                " → ".join(filter(None, (line["prompt"].strip(), line["completion"].strip()))),
            )
            for line in csv.DictReader(file)
        ]
    if not rows:
        raise ValueError("it has no rows")
    return rows


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _order(part: _Part, rows: list[_Scored], count: int, names: tuple[str, str], chart: Chart) -> Figure:
    scores = [row.score for row in rows]
    lines = [Line(names[0], range(1, count + 1), scores[:count])]
    lines += [Line(names[1], range(count + 1, len(rows) + 1), scores[count:], 1)] if count < len(rows) else []
    return line_chart("Scores of the pool", lines, chart)


def _by_source(rows: list[_Scored]) -> Grid:
    pool, selected = Counter(row.source for row in rows), Counter(row.source for row in rows if row.selected)
    lines = [
        [
            Cell(source),
            Cell(f"{number:,}"),
            Cell(f"{selected[source]:,}"),
            Cell(percent(selected[source] / number)),
        ]
        for source, number in sorted(pool.items(), key=lambda item: -selected[item[0]] / item[1])
    ]
    return Grid(["source", "rows", "selected", "share"], lines, "Selected rows by column source, or by file.")


def _examples(rows: list[_Scored], count: int, caption: str) -> Grid:
    """Rows from both ends of the order, and from both sides of the limit."""
    middle = range(max(0, count - _EACH), min(len(rows), count + _EACH))
    places = sorted({*range(min(_EACH, len(rows))), *middle, *range(max(0, len(rows) - _EACH), len(rows))})
    lines = [
        [
            Cell(f"{place + 1:,}"),
            Cell(Path(rows[place].place).name, hint=rows[place].place),
            Cell(rows[place].text),
            Cell("selected" if rows[place].selected else "left out", mark="good" if rows[place].selected else "bad"),
            Cell(short(rows[place].score)),
            Cell(f"{short(rows[place].before)} → {short(rows[place].after)}"),
            *([] if similarity is None else [Cell(short(similarity))]),
        ]
        for place in places
        for similarity in [rows[place].similarity]
    ]
    header = ["rank", "row", "text", "", "score", "loss before and after", "prompt"]
    return Grid(header[: len(lines[0])], lines, caption, (1, 2, 3), cards=True, first=_EACH, unbroken=(1, 5))
