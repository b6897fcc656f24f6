"""The figures of a report as SVG files, for papers and slides."""

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from siftune.base.errors import RecipeError
from siftune.report.page.figure import TEMPLATES, WIDTHS, Figure, distinct
from siftune.report.page.page import sections
from siftune.report.page.subjects import find_subjects

_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def write_figures(names: Sequence[str], folder: str | Path) -> list[Path]:
    """Write each figure of a report to an SVG file in the light colours. Files of the same names are replaced.

    Raises:
        InputError: As `make_page`; or the folder cannot be written to.
    """
    into = Path(folder).expanduser()
    figures = [*chain.from_iterable(section.figures for section in sections(find_subjects(names)))]
    files = {}
    for name, figure in zip(distinct([figure.name for figure in figures]), figures, strict=True):
        files[into / f"{name}.svg"] = standalone(figure)
    try:
        into.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{folder} cannot be written to ({error.strerror}); give another with --figures") from error
    return [*files]


def standalone(figure: Figure) -> str:
    """A figure as an SVG document. CSS variables become colours, because few programs but browsers know variables."""
    drawing = _NOT_IN_XML.sub("\ufffd", str(figure.draw(WIDTHS[figure.size])))
    width, height = re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawing)[0]
    colours = dict(re.findall(r"(--[\w-]+): ([^;]+);", (TEMPLATES / "theme.css").read_text(encoding="utf-8")))
    style = (TEMPLATES / "figure.css").read_text(encoding="utf-8")
    style = re.sub(r"var\((--[\w-]+)\)", lambda name: colours[name[1]], style)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    return drawing.replace("<svg ", head, 1).replace("</title>", f"</title><style>{style}</style>", 1) + "\n"
