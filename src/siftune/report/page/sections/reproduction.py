"""A paper's table beside one's own, as `python -m lab.reproduce` made it."""

from collections.abc import Mapping
from typing import Any

from siftune.base.errors import InputError
from siftune.report.page.figure import slug
from siftune.report.page.section import Section, grid_of
from siftune.report.page.subjects import STRANGE, Other
from siftune.report.table import Table


def in_a_sentence(record: Mapping[str, Any]) -> str:
    """Which table it is."""
    try:
        return f"{_tables(record)[0].title}."
    except STRANGE:
        return "A paper's table."


def reproduction(other: Other) -> Section:
    """The tables, and where the papers' figures are from."""
    try:
        tables, notes = _tables(other.content), [str(note) for note in other.content["notes"]]
    except STRANGE as error:
        raise InputError(
            f"{other.path / 'results.json'} holds no tables ({error!r}): call python -m lab.reproduce again"
        ) from error
    return Section(
        f"reproduction-{slug(other.name)}", f"Tables in {other.name}", notes, tables=[grid_of(one) for one in tables]
    )


def _tables(record: Mapping[str, Any]) -> list[Table]:
    """Tables of a file that may be a stranger's."""
    made = []
    for one in record["tables"]:
        header, rows = [str(name) for name in one["header"]], [[str(text) for text in row] for row in one["rows"]]
        if any(len(row) != len(header) for row in rows):
            raise ValueError("a row is longer or shorter than the header")
        made.append(Table(header, rows, str(one["title"])))
    return made
