"""What a figure is: a drawing that is made for two widths of the page, and as a file of its own."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

from siftune.report.page.svg import tag

Size = Literal["third", "half", "two-thirds", "full"]

# pixels across: on a phone every figure is as wide as a third of the page
NARROW = 358
WIDTHS: dict[Size, int] = {"third": NARROW, "half": 548, "two-thirds": 739, "full": 1120}

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Figure:
    """A figure."""

    name: str  # what it is called among the figures of a page: small letters, digits and hyphens
    title: str
    draw: Callable[[int], Markup]  # draws it so many pixels wide
    note: str = ""  # what to look for, or how to read it
    size: Size = "third"  # part of the page's width that it takes on a large screen
    # what the page's script tells under the pointer; see page.js. None: nothing
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
    """A text as part of a figure's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "figure"
