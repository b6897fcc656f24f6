"""Which layers trained, and by what importance."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from siftune.report.page.figure import Figure, slug
from siftune.report.page.heat import Cells, heat_map
from siftune.report.page.section import Section
from siftune.report.page.subjects import RunData
from siftune.report.page.words import NBSP, listed
from siftune.train.folder.selections import LayersOfStep

BINS = 112  # columns of a heat map over steps; a cell is then ten pixels wide at most
_NAMED = 3


def layers(run: RunData, several: bool) -> Section | None:
    """Who trained, and importance where the method has one; None where layers were not chosen."""
    steps = run.layers
    if not steps:
        return None
    depth = 1 + max(max(step.layers, default=0) for step in steps)
    depth = max([depth, *(len(step.importance) for step in steps if step.importance is not None)])
    trained_LS = _trained(steps, depth)
    figures = [_who(run, trained_LS, steps), *_importance(run, steps)]
    title = f"Layers that trained{f': {run.name}' if several else ''}"
    return Section(f"layers-{slug(run.name)}", title, [_words(run, trained_LS)], figures)


def _trained(steps: Sequence[LayersOfStep], depth: int) -> NDArray[np.float64]:
    """(L, S) 1 where a layer trained in a step."""
    trained = np.zeros((depth, len(steps)))
    for place, step in enumerate(steps):
        trained[list(step.layers), place] = 1
    return trained


def _words(run: RunData, trained_LS: NDArray[np.float64]) -> str:
    shares = trained_LS.mean(1)
    order = np.argsort(-shares, kind="stable").tolist()
    per_step = trained_LS.sum(0)
    count = f"{per_step[0]:.0f}" if np.ptp(per_step) == 0 else f"{per_step.mean():.1f} on average"
    most = listed([f"{layer} ({100 * shares[layer]:.0f}{NBSP}%)" for layer in order[:_NAMED]])
    least = listed([f"{layer} ({100 * shares[layer]:.0f}{NBSP}%)" for layer in order[-_NAMED:]])
    return (
        f"Method {run.recipe.method}: of {len(shares)} layers {count} trained in a step. Most often the layers {most} "
        f"of the steps, least often {least}. Layer 0 stands next to the embeddings."
    )


def _who(run: RunData, trained_LS: NDArray[np.float64], steps: Sequence[LayersOfStep]) -> Figure:
    values, columns = binned(trained_LS, [step.step for step in steps])
    share = values.shape[1] < trained_LS.shape[1]
    unit = "share of the steps" if share else "trained"
    cells = Cells(values[::-1], _numbers(len(values)), columns, 0, 1, "optimizer step", "layer", unit)
    note = f"Each column stands for {-(-len(steps) // BINS)} steps." if share else ""
    return heat_map(f"trained-{slug(run.name)}", "Who trained", cells, note, "full")


def _importance(run: RunData, steps: Sequence[LayersOfStep]) -> list[Figure]:
    """Importance over steps, for methods that have one: it stays as it was where it is not recorded."""
    depth = max((len(step.importance) for step in steps if step.importance is not None), default=0)
    if not depth:
        return []
    current, columns = np.zeros(depth), []
    for step in steps:
        if step.importance is not None:
            current = np.pad(step.importance, (0, depth - len(step.importance)))
        columns.append(current)
    values, labels = binned(np.stack(columns, 1), [step.step for step in steps])
    bound = float(np.abs(values).max()) or 1.0
    cells = Cells(
        values[::-1], _numbers(len(values)), labels, -bound, bound, "optimizer step", "layer", "importance"
    )  # fmt: skip
    note = "Logits, high where the loss suffered most when the layer's adapter was damped; all begin at zero."
    return [heat_map(f"importance-{slug(run.name)}", "Importance", cells, note, "full")]


def _numbers(count: int) -> list[str]:
    """Labels from the last layer, at the top, to the first."""
    return [str(layer) for layer in reversed(range(count))]


def binned(values_RS: NDArray[np.float64], steps: Sequence[int]) -> tuple[NDArray[np.float64], list[str]]:
    """Means of neighbouring steps, no more than can be told apart; and the first step of each."""
    size = -(-values_RS.shape[1] // BINS)
    parts = [np.arange(start, min(start + size, len(steps))) for start in range(0, len(steps), size)]
    return np.stack([values_RS[:, part].mean(1) for part in parts], 1), [str(steps[part[0]]) for part in parts]
