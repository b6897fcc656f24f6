"""What runs were: settings, versions and hardware."""

from collections.abc import Sequence

from siftune.recipe.read import recipe_to_yaml
from siftune.report.page.section import Cell, Grid, Section
from siftune.report.page.subjects import RunData


def setup(runs: Sequence[RunData]) -> Section | None:
    """Versions and hardware of every run, and its recipe."""
    if not runs:
        return None
    names = list(dict.fromkeys(name for run in runs for name in run.about))
    header = ["", *(run.name for run in runs)]
    rows = [[Cell(name), *(Cell(run.about.get(name, "–")) for run in runs)] for name in names]
    recipes = Grid(
        ["run", "recipe"], [[Cell(run.name), Cell(recipe_to_yaml(run.recipe).rstrip())] for run in runs],
        "The recipes, with every setting.", (0, 1),
    )  # fmt: skip
    tables = [*([Grid(header, rows, "Versions and hardware.", range(len(header)))] if rows else []), recipes]
    return Section("setup", "Recipe, versions and hardware", tables=tables, folded=True)
