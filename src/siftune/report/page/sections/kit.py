"""A kit: ranks and channels of every layer."""

from itertools import chain

import numpy as np

from siftune.offsite.kit.manifest import EMULATOR, OUTER, Manifest
from siftune.report.page.figure import Figure, slug
from siftune.report.page.heat import Cells, heat_map
from siftune.report.page.section import Cell, Grid, Section
from siftune.report.page.subjects import Other
from siftune.report.page.words import memory


def in_a_sentence(manifest: Manifest) -> str:
    """What the kit is."""
    own = sum(shape.same_as is None for shape in manifest.middle)
    first, last = manifest.split.first, manifest.split.last
    return (
        f"A kit of a {manifest.model_type} with {manifest.depth} layers: {first} and {last} outer layers to tune, "
        f"{own} of {manifest.depth - first - last} middle layers in the emulator."
    )


def kit(other: Other) -> Section:
    """Ranks and channels per layer."""
    manifest: Manifest = other.content
    size = memory(manifest.files[EMULATOR].bytes / 1e6), memory(manifest.files[OUTER].bytes / 1e6)
    words = [
        in_a_sentence(manifest),
        f"The emulator takes {size[0]}, the outer layers {size[1]}. The lower a rank or number of channels, the less "
        "of a matrix is handed out; what is kept is the base's own.",
    ]
    return Section(f"kit-{slug(other.name)}", f"Kit {other.name}", words, _figures(other), [_table(manifest)])


def _figures(other: Other) -> list[Figure]:
    manifest: Manifest = other.content
    names = list(dict.fromkeys(chain.from_iterable(dict(shape.ranks) for shape in manifest.middle)))
    layers = [str(shape.base) for shape in manifest.middle]
    if not names:
        return []
    values = np.array([[dict(shape.ranks).get(name, np.nan) for shape in manifest.middle] for name in names], float)
    shown = [name.rpartition(".")[2] for name in names]
    cells = Cells(values, shown, layers, 0.0, float(np.nanmax(values)), "layer of the base", "matrix", "rank")
    note = "An empty cell: the matrix is handed out whole, or with the MLP's channels."
    return [heat_map(f"ranks-{slug(other.name)}", "Ranks", cells, note, "full")]


def _table(manifest: Manifest) -> Grid:
    rows = [
        [
            Cell(str(shape.base), shape.base),
            Cell("whole" if shape.channels is None else f"{shape.channels:,}", shape.channels),
            Cell(", ".join(f"{name.rpartition('.')[2]} {rank}" for name, rank in dict(shape.ranks).items()) or "whole"),
            Cell("" if shape.same_as is None else f"as layer {manifest.middle[shape.same_as].base}"),
        ]
        for shape in manifest.middle
    ]
    return Grid(["layer", "MLP channels", "ranks", "shared"], rows, "The emulator's middle layers.", (2, 3))
