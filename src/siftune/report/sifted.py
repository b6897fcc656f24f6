"""Sections on the rows that sifting selected and left out for a run, with the files of scores that it wrote."""

import csv
import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from siftune.base.text import counted, parsed
from siftune.report.charts import Part, histogram
from siftune.report.parts import Cell, Grid, Section, slug
from siftune.report.subjects import RunData
from siftune.report.words import listed, percent, short
from siftune.sifting.run import RECORD, SCORES
from siftune.sifting.scoring import AVOID
from siftune.train.folder.run import SIFT

_EACH = 5  # rows from each part of the order
_SELECTED, _BY_SCORE, _LIKE_BAD, _OTHER = "selected", "score", "like the bad rows", "other task"  # in their order


class _Scored(NamedTuple):
    place: str
    score: float | None  # None for a row of another task
    losses: tuple[float, float] | None  # before and after the training on the bad rows
    similarity: float | None
    status: str  # whether it was selected, or why it was left out
    source: str
    text: str


def sifted(run: RunData, several: bool) -> Section | None:
    """Selected rows by source, the scores of the task's rows, and rows from it; None without a target's scores."""
    read = _rows(run, several, run.path / SIFT / SCORES, "Sifted rows", "sifted")
    bad = _rows(run, several, run.path / SIFT / AVOID / SCORES, "Sifted rows", "sifted") if read else None
    if not isinstance(read, _Part):
        return read
    if isinstance(bad, Section):
        return bad
    like_bad = {row.place for row in bad.rows if row.status != _SELECTED} if bad else set()
    rows = sorted((_with_reason(row, like_bad) for row in read.rows), key=_order)
    count = sum(row.status == _SELECTED for row in rows)
    words = [f"{count:,} of {counted(len(rows), 'row')} of the pool were selected{_why(run.path / SIFT / RECORD)}."]
    words += _left_out(rows)
    tables = [_by_source(rows)] if len({row.source for row in rows}) > 1 else []
    parts = _part("selected", rows[:count], 0), _part("left out", rows[count:], 1)
    axes = "score: loss after a training on the target", "rows of the task"
    note = "The higher, the less likely is the completion. Rows of other tasks have no score."
    chart = histogram("Scores of the task's rows", parts, axes, _limit(rows, _SELECTED, _BY_SCORE), note)
    figures = [chart] if any(part.values for part in parts) else []
    caption = (
        "First the last rows that were selected, and the first that were left out; then both ends of the order. "
        "Prompt: its similarity to the target's, 1 if equal."
    )
    return Section(read.anchor, read.title, words, figures, [*tables, _examples(rows, count, caption)])


def avoided(run: RunData, several: bool) -> Section | None:
    """The scores by the bad rows, and rows from both sides of the limit; None for a run without `--avoid`."""
    read = _rows(run, several, run.path / SIFT / AVOID / SCORES, "Rows like the bad ones", "avoided")
    if not isinstance(read, _Part):
        return read
    rows = sorted(read.rows, key=lambda row: (row.status == _SELECTED, row.score))
    count = sum(row.status != _SELECTED for row in rows)
    why = "" if (run.path / SIFT / SCORES).is_file() else _why(run.path / SIFT / RECORD)
    words = [f"{count:,} of {counted(len(rows), 'row')} of the pool were left out{why}."]
    parts = _part("left out", rows[:count], 1), _part("others", rows[count:], 0)
    axes = "score: change of the loss, nats per token", "rows of the pool"
    note = "Rows like the bad ones have a low score."
    chart = histogram("Scores of the pool", parts, axes, _limit(rows, _LIKE_BAD, _SELECTED), note)
    caption = (
        "First the last rows that were left out, and the first of the others; then both ends of the order by score."
    )
    return Section(read.anchor, read.title, words, [chart], [_examples(rows, count, caption)])


class _Part(NamedTuple):
    anchor: str
    title: str
    rows: list[_Scored]


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
        rows = [_scored(line) for line in csv.DictReader(file)]
    if not rows:
        raise ValueError("it has no rows")
    return rows


def _scored(line: Mapping[str, str]) -> _Scored:
    by_target = "similarity" in line
    return _Scored(
        line["place"],
        None if by_target and line["score"] == "" else _number(line["score"]),
        None if by_target else (_number(line["loss_before"]), _number(line["loss_after"])),
        _number(line["similarity"]) if by_target else None,
        _SELECTED if line["selected"] == "1" else _LIKE_BAD,  # the target's reasons follow
        line["source"],
        " → ".join(filter(None, (line["prompt"].strip(), line["completion"].strip()))),
    )


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _with_reason(row: _Scored, like_bad: Container[str]) -> _Scored:
    """The row with the reason why it was left out."""
    if row.status == _SELECTED:
        return row
    return row._replace(status=_OTHER if row.score is None else _LIKE_BAD if row.place in like_bad else _BY_SCORE)


def _order(row: _Scored) -> tuple[int, bool, float]:
    """Selected rows by score, then those that were left out by it, the bad ones, and other tasks by their prompts."""
    group = (_SELECTED, _BY_SCORE, _LIKE_BAD, _OTHER).index(row.status)
    return group, row.score is None, -(row.similarity or 0.0) if row.score is None else row.score


def _left_out(rows: Sequence[_Scored]) -> list[str]:
    """A sentence with the numbers of rows by the reason why they were left out; none if all were selected."""
    numbers = Counter(row.status for row in rows)
    texts = {_OTHER: "of other tasks", _BY_SCORE: "of the task by score", _LIKE_BAD: "of the task like the bad rows"}
    parts = [f"{counted(numbers[reason], 'row')} {text}" for reason, text in texts.items() if numbers[reason]]
    return [f"Left out: {listed(parts)}."] if parts else []


def _limit(rows: Sequence[_Scored], below: str, above: str) -> float | None:
    """The middle between the last score on one side and the first on the other; None if a side has no scores."""
    low, high = (
        [row.score for row in rows if row.status == status and row.score is not None] for status in (below, above)
    )
    return (max(low) + min(high)) / 2 if low and high else None


def _part(name: str, rows: Sequence[_Scored], colour: int) -> Part:
    return Part(name, [row.score for row in rows if row.score is not None], colour)


def _by_source(rows: list[_Scored]) -> Grid:
    pool, selected = Counter(row.source for row in rows), Counter(row.source for row in rows if row.status == _SELECTED)
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
    """Rows from both sides of the limit, after `count` rows, and from both ends of the order."""
    middle = range(max(0, count - _EACH), min(len(rows), count + _EACH))
    ends = sorted({*range(min(_EACH, len(rows))), *range(max(0, len(rows) - _EACH), len(rows))} - {*middle})
    lines = [
        [
            Cell(f"{place + 1:,}"),
            Cell(Path(row.place).name, hint=row.place),
            Cell(row.text),
            Cell(_SELECTED, mark="good") if row.status == _SELECTED else Cell(f"left out: {row.status}", mark="bad"),
            Cell(short(row.score)),
            *([] if row.losses is None else [Cell(" → ".join(map(short, row.losses)))]),
            *([] if row.similarity is None else [Cell(short(row.similarity))]),
        ]
        for place in (*middle, *ends)
        for row in [rows[place]]
    ]
    last = "prompt" if rows[0].losses is None else "loss before and after"
    header = ["rank", "row", "text", "", "score", last]
    return Grid(header, lines, caption, (1, 2, 3), cards=True, first=len(middle), unbroken=(1, 5))
