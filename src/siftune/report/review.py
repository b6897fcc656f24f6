"""Review of rows on a page: which rows of a list are shown, and what the page's script needs to save decisions.

The script (templates/review.js) shows the rows. It saves a decision file of them and of all other rows that are left
out, and a file of the rows whose completion the user has corrected.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from siftune.base.files import hash_of
from siftune.base.text import counted
from siftune.data.decisions import PLACE, SELECTED
from siftune.report.parts import Section, slug
from siftune.report.scored import OTHER, TEXTS, DecisionList, Pool, plain
from siftune.report.texts import Complete, complete_rows
from siftune.report.words import listed, short, short_places

MOST = 1000  # rows of a list on a page (ours)
_LONGEST = (
    10_000  # characters of a row that can be corrected on a page; the page shows the start of a longer one (ours)
)
_EACH = 25  # rows of a part of the list (ours)
# rows of a large pool that are on the page: on each side of the limit, at each end, and of other tasks (ours)
_NEAR, _END, _OTHERS = 250, 150, 200


def review_of_pool(pool: Pool, name: str, columns: Sequence[str] = ()) -> Section:
    """A review of the rows of a sifted pool; of a large one, of those around the limits and at both ends of the order.

    Args:
        pool: The pool.
        name: Its name in the title; empty if the page has no other.
        columns: Names of columns, as for `complete_rows`.
    """
    total, limit = len(pool.rows), pool.border
    others = next((number for number, row in enumerate(pool.rows) if row.state == OTHER), total)
    shown = [*range(total)]
    if total > MOST:
        near, rest = range(limit - _NEAR, limit + _NEAR), range(others, others + _OTHERS)
        ends = (*range(_END), *range(total - _END, total))
        shown = [number for number in sorted({*near, *rest, *ends}) if 0 <= number < total]
    spans = {
        "around the limit": range(limit - _EACH, limit + _EACH),
        "lowest scores": range(_EACH),
        "other tasks, most similar prompts": range(others, others + _EACH),
        "end of the order": range(total - _EACH, total),
    }
    parts = {part: [at for at, number in enumerate(shown) if number in span] for part, span in spans.items()}
    reasons = {number: f"left out: {row.state}" for number, row in enumerate(pool.rows) if not row.selected}
    complete, faults = complete_rows([pool.rows[at] for at in shown], columns)
    data = _data(DecisionList(pool.path, pool.header, pool.rows), shown, complete, reasons)
    data["parts"] = [[part, numbers] for part, numbers in parts.items() if numbers]
    which = "those around the limit, other tasks with the most similar prompts, and both ends of the order"
    return _section(data, which, faults, name)


def review_of_list(rows: DecisionList, name: str) -> Section:
    """A review of the rows of a decision file, in their order; of a long one, of the first.

    Args:
        rows: The rows.
        name: Its name in the title; empty if the page has no other.
    """
    shown = [*range(min(len(rows.rows), MOST))]
    reason = rows.header.index("reason") if "reason" in rows.header else None
    reasons = {} if reason is None else {number: plain(rows.rows[number].fields[reason]) for number in shown}
    complete, faults = complete_rows(rows.rows[:MOST])
    return _section(_data(rows, shown, complete, reasons), "the first", faults, name)


def _data(
    rows: DecisionList, shown: Sequence[int], complete: Mapping[str, Complete], reasons: Mapping[int, str]
) -> dict[str, Any]:
    """What the script takes.

    `rows` are those on the page: their fields in the file, what is shown of them, and their line of JSON before and
    after the completion. `others` are the other rows that are left out: the file in their places, and their numbers.
    """
    names = short_places([rows.rows[number].place for number in shown])
    columns = [at for at, name in enumerate(rows.header) if name not in (PLACE, SELECTED, *TEXTS)]
    items = []
    for number in shown:
        row = rows.rows[number]
        values = [f"{rows.header[at].replace('_', ' ')} {_short(row.fields[at])}" for at in columns if row.fields[at]]
        whole = complete.get(row.place)
        prompt, completion = (plain(text)[:_LONGEST] for text in (row.prompt, row.completion))
        if whole is not None and len(whole.text.prompt) + len(whole.text.completion) <= _LONGEST:
            prompt, completion = whole.text
        else:
            whole = None
        items.append(
            {
                "fields": row.fields,
                "selected": row.selected,
                "about": f"{number + 1:,} · {names[row.place]}",
                "numbers": ", ".join([*values, *([row.source] if row.source else [])]),
                "reason": reasons.get(number, ""),
                "prompt": prompt,
                "completion": completion,
                "around": None if whole is None else whole.around,
            }
        )
    on_page, others = {*shown}, dict[str, list[str]]()
    for number, row in enumerate(rows.rows):
        if number not in on_page and not row.selected:
            file = row.place.rstrip("0123456789")
            others.setdefault(file, []).append(row.place.removeprefix(file))
    return {
        "key": hash_of(rows.path),
        "header": rows.header,
        "rows": items,
        "parts": [],
        "others": [*others.items()],
        "total": len(rows.rows),
    }


def _short(field: str) -> str:
    """A number with three digits; another text as it is."""
    try:
        return short(float(field))
    except ValueError:
        return field


def _section(data: dict[str, Any], which: str, faults: Sequence[str], name: str) -> Section:
    shown, total = len(data["rows"]), data["total"]
    words, others = [], ""
    if shown < total:
        words.append(f"The page has {shown:,} of {counted(total, 'row')}: {which}.")
        others = ", and the others that are left out; a row that a file does not name stays in training"
    words += [
        f"Decisions stay in this browser until you save them. `decisions.csv` has the rows of this page{others}. "
        "`siftune train --drop-rows decisions.csv` leaves out the rows with `no`.",
        "A row with a corrected completion is left out by `decisions.csv`. The corrected row is in `corrected.jsonl`: "
        "add that file to `--train`, or give it as `--target`.",
    ]
    fixed = sum(item["around"] is None for item in data["rows"])
    if fixed:
        why = listed(faults) if faults else f"they have more than {_LONGEST:,} characters, or a completion without text"
        words.append(f"The completions of {counted(fixed, 'row')} cannot be corrected here: {why}.")
    anchor, title = (f"review-{slug(name)}", f"Review: {name}") if name else ("review", "Review")
    return Section(anchor, title, words, review=data)
