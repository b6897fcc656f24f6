"""One table of texts, laid out for a terminal, as lines of text, or in Markdown."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from siftune.base.text import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

_KEPT = 24  # columns of a terminal


@dataclass(frozen=True)
class Table:
    """Cells that are written out already."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]  # one text per column each
    title: str = ""  # caption; left out in Markdown, which has headings
    # numbers of the columns that hold words and are aligned on the left; the others hold figures
    words: Collection[int] = (0,)


def print_table(table: Table, console: "Console") -> None:
    """Print a table: laid out on a terminal, as lines of text elsewhere."""
    console.print(rich_table(table) if console.is_terminal else plain_table(table), markup=False)


def _for_terminal(table: Table) -> Table:
    """The table with control characters written out: titles and cells may be of untrusted files."""
    header, *rows = ([visible(cell) for cell in row] for row in (table.header, *table.rows))
    return Table(header, rows, visible(table.title), table.words)


def rich_table(table: Table) -> "RichTable":
    """Lay a table out for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.table import Table as RichTable
    from rich.text import Text

    table = _for_terminal(table)
    laid_out = RichTable(title=Text(table.title) if table.title else None, title_justify="left", box=SIMPLE_HEAD)
    for column, name in enumerate(table.header):
        words = column in table.words
        widest = max(cell_len(row[column]) for row in [table.header, *table.rows])
        whole = not words or (column == 0 and widest <= _KEPT)  # the first column identifies a line
        # folded, not cut: a place is there to be copied
        laid_out.add_column(Text(name), justify="left" if words else "right", no_wrap=whole, overflow="fold")
    for cells in table.rows:
        laid_out.add_row(*map(Text, cells))
    return laid_out


def plain_table(table: Table) -> str:
    """Write a table as lines of text in columns, the title first."""
    from rich.cells import cell_len  # some characters are two columns wide, others none

    table = _for_terminal(table)
    cells = [table.header, *table.rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        fills = [" " * (width - cell_len(text)) for text, width in zip(row, widths, strict=True)]
        parts = [
            text + fill if column in table.words else fill + text
            for column, (text, fill) in enumerate(zip(row, fills, strict=True))
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join([table.title, *lines] if table.title else lines)


def markdown_table(table: Table) -> str:
    """Write a table in Markdown, without its title.

    Example:
        >>> print(markdown_table(Table(["method", "loss"], [["dense", "0.5"]])))
        | method | loss |
        |---|---:|
        | dense | 0.5 |
    """
    header, *rows = (f"| {' | '.join(cells)} |" for cells in [table.header, *table.rows])
    rule = "|".join("---" if column in table.words else "---:" for column in range(len(table.header)))
    return "\n".join([header, f"|{rule}|", *rows])
