"""Sections on a sifted pool: the rows that were selected and left out, by the target and by bad rows.

And on the file of rows that a run was trained without.
"""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from siftune.base.errors import InputError
from siftune.base.text import counted, finite
from siftune.base.work_folder import read_record
from siftune.data.decisions import read_decisions
from siftune.report.charts import Part, histogram
from siftune.report.parts import Cell, Grid, Section, slug
from siftune.report.score_chart import score_chart
from siftune.report.scored import BY_SCORE, CHOSEN, LIKE_BAD, OTHER, Pool, Scored, by_bad_rows, by_target, plain
from siftune.report.subjects import RunData
from siftune.report.words import listed, percent, short
from siftune.sifting.checks import RECORD
from siftune.train.folder.run_folder import SIFT

_EACH = 5  # rows from each part of the order
_COMPLETIONS = 50  # different ones that are listed, at most (ours)
_FIRST = 8  # of them that are shown before the table is unfolded


def of_run(run: RunData, several: bool) -> list[Section]:
    """Sections on the pool that was sifted for a run, with some of its rows; none for a run without sifting."""
    folder, name = run.path / SIFT, run.name if several else ""
    if not (folder / RECORD).is_file():
        return []
    try:
        state = read_record(folder / RECORD).state
        pool, bad = by_target(folder, state), by_bad_rows(folder)
    except InputError as error:  # the rest of the page is right
        return [Section(f"sifted-{slug(run.name)}", _titled("Sifted rows", name), [f"Not available: {error}"])]
    examples = f"`siftune report {shlex.quote(str(folder))}` shows more of them, to decide on."
    return of_pool(pool, bad, state, name, examples)


def left_out(run: RunData, several: bool) -> Section | None:
    """The file of rows that a run was trained without, with counts; None if there is none, or if the run has sifted."""
    name = run.recipe.drop_rows
    if name is None or Path(name).expanduser().resolve().is_relative_to((run.path / SIFT).resolve()):
        return None
    section = Section(f"left-out-{slug(run.name)}", _titled("Rows left out", run.name if several else ""))
    try:
        decisions = read_decisions(name)
    except InputError as error:
        return replace(
            section, words=[f"The training left out the rows that `{name}` excludes. Not available: {error}"]
        )
    count = sum(not selected for selected in decisions.selected.values())
    copies = " and any copies" if decisions.for_copies else ""
    words = [f"The training left out the rows that `{name}` excludes: {counted(count, 'row')}{copies}."]
    return replace(section, words=words)


def of_pool(pool: Pool | None, bad: Pool | None, state: dict[str, Any], name: str, examples: str = "") -> list[Section]:
    """Sections on a sifted pool.

    Args:
        pool: The pool by the scores of the target; None without a target.
        bad: The pool by the scores of bad rows; None without them.
        state: What the record of the sifting says, not checked.
        name: Its name in titles; empty if the page has no other.
        examples: A sentence after a table of some rows; without it there is no such table.
    """
    sections = []
    if pool is not None:
        sections.append(_by_target(pool, _why(state), name, examples))
    if bad is not None:
        sections.append(_by_bad_rows(bad, "" if pool else _why(state), name, examples))
    return sections


def _titled(title: str, name: str) -> str:
    return f"{title}: {name}" if name else title


def _by_target(pool: Pool, why: str, name: str, examples: str) -> Section:
    """Selected rows by source and completion, a chart of similarities and scores, and rows from it."""
    rows, count = pool.rows, pool.count
    words = [f"{count:,} of {counted(len(rows), 'row')} of the pool were selected{why}.", *_left_out(rows)]
    measured = [row for row in rows if row.similarity is not None]
    selected, others = (
        [(row.similarity or 0.0, row.score) for row in measured if row.selected is side] for side in (True, False)
    )
    figures = [score_chart(selected, others, pool.limits)] if measured else []
    tables = [_shares("source", rows)] if len({row.source for row in rows}) > 1 else []
    task = [row for row in rows if row.state != OTHER]
    if 1 < len({row.completion.strip() for row in task}) <= min(_COMPLETIONS, len(task) // 4):
        tables.append(_shares("completion", task))
    if examples:
        first = "the last rows of the task, and the first of other tasks"
        if pool.limits.score is not None:
            first = "the last rows below the limit on the score, and the first above it"
        caption = (
            f"First {first}; then both ends of the order. Prompt: its similarity to the target's, 1 if equal. "
            f"{examples}"
        )
        tables.append(_examples(pool, caption, by_losses=False))
    return Section(f"sifted-{slug(name)}" if name else "sifted", _titled("Sifted rows", name), words, figures, tables)


def _by_bad_rows(pool: Pool, why: str, name: str, examples: str) -> Section:
    """The scores by the bad rows, and rows from both sides of the limit."""
    rows, count = pool.rows, pool.count
    words = [f"{count:,} of {counted(len(rows), 'row')} of the pool were left out{why}."]
    scores = [[row.score for row in part if row.score is not None] for part in (rows[:count], rows[count:])]
    figures = []
    if any(scores):
        limit = (max(scores[0]) + min(scores[1])) / 2 if all(scores) else None
        parts = Part("left out", scores[0], 1), Part("others", scores[1], 0)
        axes = "score: change of the loss, nats per token", "rows of the pool"
        note = "Rows like the bad ones have a low score."
        figures.append(histogram("Scores of the pool", parts, axes, limit, note))
    caption = (
        "First the last rows that were left out, and the first of the others; then both ends of the order by score. "
        f"{examples}"
    )
    tables = [_examples(pool, caption, by_losses=True)] if examples else []
    title = _titled("Rows like the bad ones", name)
    return Section(f"avoided-{slug(name)}" if name else "avoided", title, words, figures, tables)


def _why(state: dict[str, Any]) -> str:
    """The reason and the time of a sifting, from its record; empty if it has none."""
    try:
        return f" in {finite(state['seconds']):,.0f} s: {state['reason']}"
    except (LookupError, ValueError, TypeError):
        return ""


def _left_out(rows: Sequence[Scored]) -> list[str]:
    """A sentence with the numbers of rows by the reason why they were left out; none if all were selected."""
    numbers = Counter(row.state for row in rows)
    texts = {OTHER: "of other tasks", BY_SCORE: "of the task by score", LIKE_BAD: "of the task like the bad rows"}
    parts = [f"{counted(numbers[reason], 'row')} {text}" for reason, text in texts.items() if numbers[reason]]
    return [f"Left out: {listed(parts)}."] if parts else []


def _shares(kind: str, rows: Sequence[Scored]) -> Grid:
    """Selected share of the rows of each source, or with each completion, the highest first."""
    values = [(row.source if kind == "source" else plain(row.completion).strip(), row.selected) for row in rows]
    all_rows, selected = Counter(value for value, _ in values), Counter(value for value, chosen in values if chosen)
    order = sorted(all_rows, key=lambda value: -selected[value] / all_rows[value])
    lines = [
        [
            Cell(value),
            Cell(f"{all_rows[value]:,}"),
            Cell(f"{selected[value]:,}"),
            Cell(percent(selected[value] / total)),
        ]
        for value in order
        for total in [all_rows[value]]
    ]
    of = (
        "Selected rows by column source, or by file."
        if kind == "source"
        else "Selected rows of the task by completion."
    )
    return Grid([kind, "rows", "selected", "share"], lines, of, first=_FIRST)


def _examples(pool: Pool, caption: str, by_losses: bool) -> Grid:
    """Rows from both sides of the limit and from both ends of the order, with losses or similarities."""
    rows, border = pool.rows, pool.border
    middle = range(max(0, border - _EACH), min(len(rows), border + _EACH))
    ends = sorted({*range(min(_EACH, len(rows))), *range(max(0, len(rows) - _EACH), len(rows))} - {*middle})
    lines = [
        [
            Cell(f"{number + 1:,}"),
            Cell(Path(row.place).name, hint=row.place),
            Cell(" → ".join(filter(None, (plain(text).strip() for text in (row.prompt, row.completion))))),
            Cell(CHOSEN, mark="good") if row.state == CHOSEN else Cell(f"left out: {row.state}", mark="bad"),
            Cell(short(row.score)),
            Cell(" → ".join(map(short, row.losses or (None,))) if by_losses else short(row.similarity)),
        ]
        for number in (*middle, *ends)
        for row in [rows[number]]
    ]
    header = ["rank", "row", "text", "", "score", "loss before and after" if by_losses else "prompt"]
    return Grid(header, lines, caption, (1, 2, 3), cards=True, first=len(middle), unbroken=(1, 5))
