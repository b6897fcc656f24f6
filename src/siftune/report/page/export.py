"""The figures of a report as files of their own, for papers: SVG, and PNG where something here draws it."""

import re
from collections.abc import Sequence
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from siftune.base.errors import RecipeError
from siftune.report.page.figure import TEMPLATES, WIDTHS, Figure, distinct
from siftune.report.page.page import sections
from siftune.report.page.subjects import find_subjects

_ZOOM = 3.0  # pixels of a PNG for one of the page
_UNKNOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # what XML does not hold
_FONT = "DejaVu Sans"  # comes with matplotlib, so that pictures have letters on machines without fonts


def write_figures(names: Sequence[str], folder: str | Path) -> list[Path]:
    """Write the figures of a report, each as an SVG file, and as PNG where the package resvg-py is installed.

    Files of the same names are replaced.

    Raises:
        InputError: As `make_page`; or the folder cannot be written to.
    """
    into, drawer = Path(folder).expanduser(), _drawer()
    figures = [*chain.from_iterable(section.figures for section in sections(find_subjects(names)))]
    named = zip(distinct([figure.name for figure in figures]), figures, strict=True)
    try:
        into.mkdir(parents=True, exist_ok=True)
        return [*chain.from_iterable(_write(figure, into / name, drawer) for name, figure in named)]
    except OSError as error:
        raise RecipeError(f"{folder} cannot be written to ({error.strerror}); give another with --figures") from error


def standalone(figure: Figure) -> str:
    """A figure as the text of an SVG file: in the light colours, which stand in it."""
    drawing = _UNKNOWN.sub("\ufffd", str(figure.draw(WIDTHS[figure.size])))
    width, height = re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawing)[0]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    return drawing.replace("<svg ", head, 1).replace("</title>", f"</title><style>{_style()}</style>", 1) + "\n"


def _style() -> str:
    """The figures' style sheet with colours in the place of their names, which few programs but browsers know."""
    colours = dict(re.findall(r"(--[\w-]+): ([^;]+);", (TEMPLATES / "theme.css").read_text(encoding="utf-8")))
    style = (TEMPLATES / "figure.css").read_text(encoding="utf-8")
    return re.sub(r"var\((--[\w-]+)\)", lambda name: colours[name[1]], style)


def _write(figure: Figure, path: Path, drawer: Any) -> list[Path]:
    text = standalone(figure)
    files = [path.with_name(f"{path.name}.svg")]
    files[0].write_text(text, encoding="utf-8")
    if drawer is not None:
        files.append(path.with_name(f"{path.name}.png"))
        files[1].write_bytes(_png(text, drawer))
    return files


def _png(text: str, drawer: Any) -> bytes:
    from matplotlib import get_data_path

    fonts = Path(get_data_path()) / "fonts" / "ttf"
    drawn = drawer.svg_to_bytes(
        svg_string=re.sub(r"11px [^;]+;", f'11px "{_FONT}";', text),
        background="white",
        zoom=_ZOOM,
        font_files=[str(fonts / name) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")],
        skip_system_fonts=True,
    )
    return bytes(drawn)


def _drawer() -> Any:
    """What makes PNG of SVG; None where it is not installed."""
    try:
        return import_module("resvg_py")
    except ModuleNotFoundError:
        return None
