"""Draw what selection chose in two real runs: which layers IST trained, and which rows every layer followed with GAST.

python -m lab.picture --ist RUN --gast RUN --out docs/images/selection.png

Both are folders of `siftune train`. Each panel has its colour bar: IST's importance logits as they were at the step,
GAST's scores as z-scores within the layer.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.patches import Rectangle

from siftune.train.folder.selections import LayersOfStep, RowsOfBatch, read_selections

_RECORDS = Path(__file__).parent / "results" / "picture"
_EMPTY = "#f8f9fa"  # a cell in which nothing trained
_SIZE = (10.0, 3.8)  # inches, 100 px each


def main() -> None:
    """Read both runs' selection records and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ist", type=Path, default=_RECORDS / "ist", help="folder of a run with IST")
    parser.add_argument("--gast", type=Path, default=_RECORDS / "gast", help="folder of a run with GAST")
    parser.add_argument("--steps", type=int, default=60, help="last so many steps of IST's run to show")
    parser.add_argument("--out", type=Path, default=Path("docs/images/selection.png"), help=".svg or .png")
    options = parser.parse_args()
    plt.rcParams |= {"font.size": 10, "svg.hashsalt": "siftune", "axes.titlesize": 11, "axes.titlelocation": "left"}
    figure, (left, right) = plt.subplots(1, 2, figsize=_SIZE, width_ratios=(1.15, 1), layout="constrained")
    draw_layers(left, records(options.ist), options.steps)
    draw_rows(right, records(options.gast)[-1])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, facecolor="white", dpi=200, metadata={"Date": None} if _is_svg(options.out) else None)


def records(run: Path) -> list[LayersOfStep | RowsOfBatch]:
    """Read the selection records of a run folder."""
    found = list(read_selections(run))
    if not found:
        raise SystemExit(f"{run} has no record of selection; give the folder of a run with IST or GAST")
    return found


def importance_by_step(steps: list[LayersOfStep]) -> np.ndarray:
    """(S, L) importance logits at each step; only steps that scored record them, before the first they are zero."""
    updates = [record.importance for record in steps if record.importance is not None]
    if not updates:
        raise SystemExit("no step of IST's run scored its layers; give a run of more than --ist.interval steps")
    current, rows = np.zeros(len(updates[0])), []
    for record in steps:
        current = current if record.importance is None else record.importance
        rows.append(current)
    return np.stack(rows)


def draw_layers(axes: Axes, steps: list[LayersOfStep], count: int) -> None:
    """Draw layers × steps: a cell is filled where the layer trained, in the colour of its importance."""
    importance_SL = importance_by_step(steps)[-count:]
    first, layers = max(0, len(steps) - count), importance_SL.shape[1]
    cells = [(s, layer) for s, record in enumerate(steps[-count:]) for layer in record.layers]
    bound = float(np.abs(importance_SL).max())
    axes.set_facecolor(_EMPTY)
    filled = _squares([(first + s, layer, 0.9) for s, layer in cells])
    _colour(axes, filled, [importance_SL[cell] for cell in cells], bound, "importance")
    axes.set(xlim=(first - 0.5, first + len(importance_SL) - 0.5), ylim=(-0.5, layers - 0.5))
    axes.set(xlabel="optimizer step", ylabel="layer", title="IST: layers that train")


def draw_rows(axes: Axes, batch: RowsOfBatch) -> None:
    """Draw rows × layers of one batch: the score as colour, a full cell where the layer followed the row."""
    if batch.scores is None:
        raise SystemExit("GAST's run has no scores; run it without --no-keep-scores")
    scores_UB = batch.scores.astype(float)
    z_UB = (scores_UB - scores_UB.mean(1, keepdims=True)) / scores_UB.std(1, keepdims=True)
    layers, rows = z_UB.shape
    cells = [
        (layer, row, 0.9 if batch.followed[layer, row] else 0.35) for layer in range(layers) for row in range(rows)
    ]
    _colour(axes, _squares(cells), [z_UB[layer, row] for layer, row, _ in cells], 2.0, "score (z)")
    axes.set(xlim=(-0.5, layers - 0.5), ylim=(-0.5, rows - 0.5), facecolor=_EMPTY)
    axes.set(xlabel="layer", ylabel="row of the batch", title="GAST: rows that a layer follows (small: not followed)")


def _squares(cells: list[tuple[int, int, float]]) -> PatchCollection:
    """Make cells of the grid: column, row, and side as a share of the cell's."""
    return PatchCollection([Rectangle((x - side / 2, y - side / 2), side, side) for x, y, side in cells])


def _colour(axes: Axes, squares: PatchCollection, values: list[float], bound: float, label: str) -> None:
    """Colour the cells by their values, blue to red around zero, and add the colour bar."""
    squares.set(array=np.asarray(values), clim=(-bound, bound), cmap="coolwarm", linewidth=0)
    axes.add_collection(squares)
    bar = axes.figure.colorbar(squares, ax=axes, label=label, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _is_svg(path: Path) -> bool:
    return path.suffix == ".svg"


if __name__ == "__main__":
    main()
