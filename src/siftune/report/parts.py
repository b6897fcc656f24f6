"""The parts of a page as plain data, which the template escapes: text, tables and SVG figures."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup, escape

from siftune.report.table import Table

Child = str | Markup


def tag(name: str, *children: Child, **attributes: object) -> Markup:
    """An SVG element. `class_` is `class`; underscores in names of attributes become hyphens.

    Example:
        >>> tag("text", "a < b", x=1.25, class_="tick")
        Markup('<text x="1.2" class="tick">a &lt; b</text>')
    """
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    markup = Markup("").join(Markup(' {}="{}"').format(Markup(key), _text(value)) for key, value in pairs)
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), markup, inner)


def path(points: list[tuple[float, float]]) -> str:
    """A line through points, as the attribute `d` of a path."""
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def _text(value: object) -> str:
    return number(value) if isinstance(value, float) else str(value)


Size = Literal["third", "half", "full"]

# pixels across: on a phone every figure is as wide as a third of the page
NARROW = 358
WIDTHS: dict[Size, int] = {"third": NARROW, "half": 548, "full": 1120}

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Figure:
    """A figure."""

    title: str
    draw: Callable[[int], Markup]  # draws it at a width in pixels
    note: str = ""  # what to look for, or how to read it
    size: Size = "third"  # part of the page's width that it takes on a large screen
    # what the page's script shows under the pointer; see page.js. None: nothing
    hover: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def drawings(self) -> list[tuple[str, Markup]]:
        """Class of the drawing -> the drawing: one for all screens, or one for small and one for large."""
        if self.size == "third":
            return [("any", self.draw(NARROW))]
        return [("small", self.draw(NARROW)), ("large", self.draw(WIDTHS[self.size]))]


def canvas(width: int, height: float, label: str, *children: Markup) -> Markup:
    """A drawing of its own coordinates, in pixels."""
    return tag(
        "svg", tag("title", label), *children, viewBox=f"0 0 {width} {height:.0f}", role="img", class_="chart"
    )  # fmt: skip


def distinct(names: Sequence[str]) -> list[str]:
    """Names that differ: those that were given before have a number behind.

    Example:
        >>> distinct(["loss", "loss", "loss-2"])
        ['loss', 'loss-2', 'loss-2-2']
    """
    taken: dict[str, None] = {}
    for name in names:
        new = (name, *(f"{name}-{count}" for count in range(2, len(names) + 1)))
        taken[next(one for one in new if one not in taken)] = None
    return list(taken)


def slug(text: str) -> str:
    """A text as part of an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "part"


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    mark: Literal["", "good", "bad"] = ""
    hint: str = ""  # shown under the pointer


@dataclass(frozen=True)
class Grid:
    """A table."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    words: Sequence[int] = (0,)  # numbers of the columns that hold words; the others hold figures
    cards: bool = False  # texts are long: on a small screen every row becomes a card
    first: int = 0  # number of rows that are shown before the reader unfolds the others; 0: all
    unbroken: Sequence[int] = ()  # numbers of the columns whose words stay on one line, such as places of rows


def grid_of(table: Table) -> Grid:
    """A table that is written out already."""
    return Grid(table.header, [[Cell(text) for text in row] for row in table.rows], table.title, sorted(table.words))


def marked_up(text: str) -> Markup:
    """Escaped text, in which a part between backticks is code.

    Example:
        >>> marked_up("`siftune rows <run>` lists them")
        Markup('<code>siftune rows &lt;run&gt;</code> lists them')
    """
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str  # its name in links: small letters, digits and hyphens
    title: str
    words: Sequence[str] = ()  # paragraphs above the figures
    figures: Sequence[Figure] = ()
    tables: Sequence[Grid] = ()
    review: dict[str, Any] | None = field(default=None, repr=False)  # rows to decide on: see review.py
    folded: bool = False  # its tables are shown on request
