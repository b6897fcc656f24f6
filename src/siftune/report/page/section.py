"""What a part of the page is made of: words, figures and tables, as plain data that the template escapes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from siftune.report.page.figure import Figure
from siftune.report.table import Table


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What stands in it.
        key: What it is sorted by; its text if not given.
        mark: How it is marked: "good", "bad", or not.
    """

    text: str
    key: float | None = None
    mark: Literal["", "good", "bad"] = ""


@dataclass(frozen=True)
class Grid:
    """A table, which sorts by a click on a column's head.

    Attributes:
        header: Names of the columns.
        rows: A cell for each column.
        caption: What it shows.
        words: Numbers of the columns that hold words; the others hold figures.
        cards: Texts are long: on a small screen every row becomes a card.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    words: Sequence[int] = (0,)
    cards: bool = False


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
    """A part of the page.

    Attributes:
        anchor: Its name in links: small letters, digits and hyphens.
        title: Its heading.
        words: Paragraphs above the figures.
        figures: Figures.
        tables: Tables.
        folded: Its tables are shown on request.
    """

    anchor: str
    title: str
    words: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Grid] = ()
    folded: bool = False
