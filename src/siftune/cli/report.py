"""`siftune report`: one page on runs, kits, sweeps, audits and costs."""

from typing import Annotated, Any

from pydantic.dataclasses import dataclass

from siftune.base.settings import CONFIG, Validated
from siftune.cli.options import Flag


@dataclass(config=CONFIG)
class Options(Validated):
    """Write one page on runs, kits, sweeps, audits and costs: a single file for any browser, without network access.

    Unfinished runs are shown as well.
    """

    folders: Annotated[tuple[str, ...], Flag("folder", positional=True)]
    """Folders of siftune train, demo, find-lr, emulate, compare-emulators or audit, or files of siftune bench --out;
    several runs are compared with each other."""
    out: Annotated[str, Flag(short="-o")] = "report.html"
    """File to write; an existing one is replaced."""
    figures: str | None = None
    """Folder for the figures as SVG files; none are written if not given."""


def run(options: Options) -> dict[str, Any]:
    """Write the page, and the figures with --figures."""
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
