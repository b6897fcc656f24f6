"""`siftune report`: one page on runs, sifted pools and lists of rows."""

from typing import Annotated, Any

from pydantic.dataclasses import dataclass

from siftune.base.settings import CONFIG, Validated
from siftune.cli.options import Flag


@dataclass(config=CONFIG)
class Options(Validated):
    """Write one page on runs or sifted pools: a single file for any browser, without network access.

    Unfinished runs are shown as well. On the page of a sifted pool, or of a list of siftune rows, rows can be kept or
    dropped, and completions corrected; it saves files for siftune train.
    """

    folders: Annotated[tuple[str, ...], Flag("folder", positional=True)]
    """Folders of siftune train, sift or demo, or CSV files of siftune rows. Several runs are compared."""
    out: Annotated[str, Flag(short="-o")] = "report.html"
    """File to write; an existing one is replaced."""


def run(options: Options) -> dict[str, Any]:
    """Write the page."""
    from siftune.base.stages import text_console
    from siftune.report.page import make_page

    console = text_console(stderr=True)
    page = make_page(options.folders).write(options.out)
    console.print(f"report in {page} ({page.stat().st_size / 1000:,.0f} kB): open it in a browser", markup=False)
    return {"report": page, "bytes": page.stat().st_size}
