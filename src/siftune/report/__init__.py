"""What results look like: tables, Markdown, pictures, and the page that `siftune report` writes."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from siftune.report.page import Page


def show(*folders: str | Path) -> "Page":
    """The report of runs, sifted pools and lists of rows, as the last line of a notebook's cell shows it.

    Args:
        folders: As for `siftune report`.

    Returns:
        A page; `write("report.html")` makes a file of it.

    Raises:
        InputError: A folder holds nothing to report on, or a file in it is damaged.

    Example:
        >>> import tempfile
        >>> show(tempfile.mkdtemp())  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        siftune.base.errors.RecipeError: nothing to report on
    """
    from siftune.report.page import make_page

    return make_page([str(folder) for folder in folders])
