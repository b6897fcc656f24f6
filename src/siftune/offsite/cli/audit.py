"""`siftune audit`: what a kit gives the data owner, what it gives away, and what comes back."""

from pathlib import Path
from typing import Annotated, Any

from pydantic.dataclasses import dataclass

from siftune.base.settings import CONFIG
from siftune.base.stages import text_console
from siftune.cli.options import Flag
from siftune.offsite.audits.settings import AuditOptions
from siftune.offsite.cli.paths import refuse_swapped

PATHS = {"folders": ("kit", "returned")}


@dataclass(config=CONFIG)
class Options(AuditOptions):
    """Audit a kit: what its emulator gives the data owner, what it gives away, and what comes back.

    Base model and emulator are measured before and after their outer layers are tuned on the same rows; those tuned on
    the emulator are plugged into the base; and it is tried out what a data owner could recover, and what a return
    reveals of the rows that it was tuned on.

    A data owner, who does not have the base, leaves --model out and gives --return: then it is tried out on the
    emulator what the return reveals of its rows.
    """

    returned: Annotated[Path | None, Flag("return")] = None
    """Return to audit in place of layers that are tuned here; train is then the rows that it was tuned on."""
    out: Path | None = None
    """Folder for audit.json and audit.md."""


def run(options: Options) -> dict[str, Any]:
    """Audit, and print the page."""
    if options.kit:
        refuse_swapped(options.kit, options.returned)
    options.check()
    from rich.markdown import Markdown

    from siftune.base.stages import stages
    from siftune.offsite.audits.audit import audit_paths, own_audit_paths
    from siftune.offsite.report.audit import markdown, prepare_folder, write_audit

    if options.out is not None:
        prepare_folder(options.out)  # before hours of work
    console = text_console(stderr=True)
    page = text_console()
    with stages(console) as progress:
        result = audit_paths(options, progress) if options.model else own_audit_paths(options, progress)
    if options.out is not None:
        write_audit(result, options.out)
    text = markdown(result)
    page.print(Markdown(text) if page.is_terminal else text, markup=False)
    if options.out is not None:
        console.print(f"audit in {options.out}", markup=False)
    return result.to_dict()
