"""`siftune rows`: suspect rows of a run, with text and place."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic.dataclasses import dataclass

from siftune.base.errors import DataError, RecipeError
from siftune.base.settings import CONFIG, Count, Validated
from siftune.base.text import counted
from siftune.cli.options import Flag

if TYPE_CHECKING:
    from siftune.suspects.named import Suspect


@dataclass(config=CONFIG)
class Options(Validated):
    """Name the training rows of a run that may be wrong: those that cost far more than others of their source.

    Look at them before you drop any: rows that are hard or rare cost much, too. `siftune train --drop-rows FILE` trains
    without the rows of a list.
    """

    run: Annotated[str, Flag("run", positional=True)]
    """Run folder, or any folder with the rows.parquet that RowRecord wrote."""
    top: Count | None = None
    """Report at most N rows; if not given, 10 on the screen and all in files."""
    files: tuple[str, ...] = ()
    """Files of the rows, if somebody else trained, or on another machine: only files that you name are read."""
    csv: Path | None = None
    """Write them to this CSV file, with complete texts."""
    html: Path | None = None
    """Write them to this page, with complete texts."""


_SHOWN = 10


def run(options: Options) -> dict[str, Any]:
    """Find them, show them, and write what was asked for."""
    from rich.console import Console

    from siftune.report.rows import table, to_csv, to_html
    from siftune.report.table import plain_table
    from siftune.suspects.named import Rows

    for flag, path in (("--csv", options.csv), ("--html", options.html)):
        if path is not None and path.expanduser().is_dir():
            raise RecipeError(f"{flag} {path} is a folder: give the file to write")
    folder = Path(options.run).expanduser()
    if not folder.is_dir():
        raise DataError(f"there is no run folder {options.run}; give one that siftune train has made.")
    rows = Rows(folder, options.files)
    found = rows.suspects(options.top)
    many = "at least " if len(found) == options.top else ""
    title = f"{many}{len(found):,} of {counted(len(rows.places), 'row')} of {options.run} may be wrong"
    shown = found[: options.top or _SHOWN]
    console = Console(highlight=False, soft_wrap=True)
    if shown:
        console.print(plain_table(table(shown, title)), markup=False)
    aside = Console(stderr=True, highlight=False, soft_wrap=True)
    if rows.note:
        aside.print(rows.note, markup=False)
    _tell(aside, found, shown, len(rows.places))
    if options.csv is not None:
        _write(options.csv, to_csv(found))
    if options.html is not None:
        _write(options.html, to_html(found, title, NOTE))
    return {"run": folder, "rows": len(rows.places), "suspects": found}


NOTE = "Rows that cost far more than others of their source. Hard and rare rows do so, too: look before you drop any."


def _tell(console: Any, found: "list[Suspect]", shown: "list[Suspect]", rows: int) -> None:
    """Say what the table is, and what to do with it."""
    if not found:
        console.print(f"none of {counted(rows, 'row')} stands out by its loss")
        return
    more = f"{len(found) - len(shown):,} more with --top or --csv FILE; " if len(found) > len(shown) else ""
    console.print(f"{NOTE}\n{more}`siftune train --drop-rows FILE` trains without those of a list", markup=False)


def _write(path: Path, text: str) -> None:
    from siftune.base.files import write_beside

    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_beside(path) as [beside]:
        beside.write_text(text, encoding="utf-8")
