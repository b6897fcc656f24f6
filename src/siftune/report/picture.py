"""Pictures: one way to open a figure and to turn it into a PNG file; needs no display and leaves no state behind."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# apart for colour-blind readers too (Okabe & Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def new_figure(width: float, height: float) -> "Figure":
    """A figure outside pyplot, which would keep it and ask for a display; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file, which depends on nothing but what was drawn."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()
