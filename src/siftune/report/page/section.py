"""What a part of the page is made of: words, figures and tables, as plain data that the template escapes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from siftune.report.page.figure import Figure
from siftune.report.table import Table


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    key: float | None = None  # what it is sorted by; None: its text
    mark: Literal["", "good", "bad"] = ""


@dataclass(frozen=True)
class Grid:
    """A table, which sorts by a click on a column's head."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    words: Sequence[int] = (0,)  # numbers of the columns that hold words; the others hold figures
    cards: bool = False  # texts are long: on a small screen every row becomes a card


def grid_of(table: Table) -> Grid:
    """A table that is written out already; columns of figures sort by what their cells begin with."""
    rows = [
        [Cell(text, None if column in table.words else _leading(text)) for column, text in enumerate(row)]
        for row in table.rows
    ]
    return Grid(table.header, rows, table.title, sorted(table.words))


def _leading(text: str) -> float | None:
    found = re.match(r"\W*?([-−]?[\d,]*\.?\d+(?:e[-+]?\d+)?)", text)
    return float(found[1].replace(",", "").replace("−", "-")) if found else None


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str  # its name in links: small letters, digits and hyphens
    title: str
    words: Sequence[str] = ()  # paragraphs above the figures
    figures: Sequence[Figure] = ()
    tables: Sequence[Grid] = ()
    folded: bool = False  # its tables are shown on request
