"""`siftune report`: one page on runs, kits, sweeps, audits, costs and papers' tables."""

from typing import Annotated, Any

from pydantic.dataclasses import dataclass

from siftune.base.settings import CONFIG, Validated
from siftune.cli.options import Flag


@dataclass(config=CONFIG)
class Options(Validated):
    """Write a page on what was trained, made or measured: one file, which needs no network, for any browser.

    Runs that are still under way can be shown, too.
    """

    folders: Annotated[tuple[str, ...], Flag("folder", positional=True)]
    """Folders of siftune train, demo, sweep-lr, reproduce, emulate, sweep or audit, or files of siftune bench --out;
    several runs are compared."""
    out: Annotated[str, Flag(short="-o")] = "report.html"
    """File to write; one that is there is replaced."""
    figures: str | None = None
    """Folder for the figures as SVG files; none are written if not given."""


def run(options: Options) -> dict[str, Any]:
    """Write the page, and the figures where they are asked for."""
    from rich.console import Console

    from siftune.base.text import counted
    from siftune.report.page import make_page, write_figures

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    page = make_page(options.folders).write(options.out)
    console.print(f"report in {page} ({page.stat().st_size / 1000:,.0f} kB): open it in a browser", markup=False)
    result: dict[str, Any] = {"report": page, "bytes": page.stat().st_size}
    if options.figures is not None:
        files = write_figures(options.folders, options.figures)
        console.print(f"{counted(len(files), 'file')} of figures in {options.figures}", markup=False)
        result["figures"] = files
    return result
