"""Sections on the layers that trained and the rows that layers followed."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from siftune.methods.drivers.sample_choice import ALL_LAYERS
from siftune.report.charts import COLOURS, Chart, Line, line_chart
from siftune.report.heat import LABEL, Cells, heat_map
from siftune.report.parts import Figure, Section, slug
from siftune.report.subjects import RunData
from siftune.report.words import NBSP, cut, listed, percent
from siftune.train.folder.selections import LayersOfStep, RowsOfBatch

BINS = 112  # columns of a heat map over steps; a cell is then ten pixels wide at most
_NAMED = 3
# ends of the colours, at least, so that noise is pale (ours)
_LEAST_IMPORTANCE, _LEAST_Z = 1.0, 0.5


def layers(run: RunData, several: bool) -> Section | None:
    """Who trained, and importance where the method has one; None where layers were not chosen."""
    steps = run.layers
    if not steps:
        return None
    depth = 1 + max(max(step.layers, default=0) for step in steps)
    depth = max([depth, *(len(step.importance) for step in steps if step.importance is not None)])
    trained_LS = _trained(steps, depth)
    figures = [_who(run, trained_LS, steps), *_importance(run, steps)]
    title = f"Trained layers{f': {run.name}' if several else ''}"
    return Section(f"layers-{slug(run.name)}", title, [_layer_text(run, trained_LS)], figures)


def _trained(steps: Sequence[LayersOfStep], depth: int) -> NDArray[np.float64]:
    """(L, S) 1 where a layer trained in a step."""
    trained = np.zeros((depth, len(steps)))
    for place, step in enumerate(steps):
        trained[list(step.layers), place] = 1
    return trained


def _layer_text(run: RunData, trained_LS: NDArray[np.float64]) -> str:
    shares = trained_LS.mean(1)
    order = np.argsort(-shares, kind="stable").tolist()
    per_step = trained_LS.sum(0)
    count = f"{per_step[0]:.0f}" if np.ptp(per_step) == 0 else f"{per_step.mean():.1f} on average"
    most = listed([f"{layer} ({100 * shares[layer]:.0f}{NBSP}%)" for layer in order[:_NAMED]])
    least = listed([f"{layer} ({100 * shares[layer]:.0f}{NBSP}%)" for layer in order[-_NAMED:]])
    return (
        f"Method {run.recipe.method}: of {len(shares)} layers {count} trained in a step. Most often the layers {most} "
        f"of the steps, least often {least}. Layer 0 is next to the embeddings."
    )


def _who(run: RunData, trained_LS: NDArray[np.float64], steps: Sequence[LayersOfStep]) -> Figure:
    values, columns = binned(trained_LS, [step.step for step in steps])
    share = values.shape[1] < trained_LS.shape[1]
    unit = "share of the steps" if share else "trained"
    cells = Cells(values[::-1], _numbers(len(values)), columns, 0, 1, "optimizer step", "layer", unit)
    note = f"Each column is {-(-len(steps) // BINS)} steps." if share else ""
    return heat_map("Trained layers by step", cells, note, "full")


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
    bound = max(float(np.abs(values).max()), _LEAST_IMPORTANCE)
    cells = Cells(
        values[::-1], _numbers(len(values)), labels, -bound, bound, "optimizer step", "layer", "importance"
    )  # fmt: skip
    note = "Logits. Layers whose adapters raise the loss most if suppressed get high ones. All begin at zero."
    return [heat_map("Importance", cells, note, "full")]


def _numbers(count: int) -> list[str]:
    """Labels from the last layer, at the top, to the first."""
    return [str(layer) for layer in reversed(range(count))]


def binned(values_RS: NDArray[np.float64], steps: Sequence[int]) -> tuple[NDArray[np.float64], list[str]]:
    """Means of neighbouring steps, no more than can be told apart; and the first step of each."""
    size = -(-values_RS.shape[1] // BINS)
    parts = [np.arange(start, min(start + size, len(steps))) for start in range(0, len(steps), size)]
    return np.stack([values_RS[:, part].mean(1) for part in parts], 1), [str(steps[part[0]]) for part in parts]


_BINS = 24  # points of a line of shares
_SOURCES = COLOURS  # sources with a line of their own; rarer ones share one
_OTHERS = "others"
_LARGEST = 64  # rows of a batch that are shown
_BOUND = 2.0  # z-scores at which the colours end


def rows(run: RunData, several: bool) -> Section | None:
    """Alignment and shares followed; None where rows were not chosen."""
    batches = run.batches
    if not batches:
        return None
    sources = _Sources(batches)
    partial = [batch for batch in batches if not batch.followed.all()] or batches  # before all rows were followed
    figures = [_one_batch(run, partial[-1], sources)]
    figures += [*_shares(run, batches, sources), *_by_source(run, batches, sources)]
    title = f"Followed rows{f': {run.name}' if several else ''}"
    return Section(f"rows-{slug(run.name)}", title, _row_text(run, batches, sources), figures)


class _Sources:
    """The most frequent sources, and one name for the others."""

    def __init__(self, batches: Sequence[RowsOfBatch]) -> None:
        counts: dict[str, int] = {}
        for batch in batches:
            for source in batch.sources:
                counts[source] = counts.get(source, 0) + 1
        order = sorted(counts, key=lambda source: (-counts[source], source))
        most = _SOURCES if len(order) <= _SOURCES else _SOURCES - 1
        self.names = [*order[:most], *([_OTHERS] if len(order) > most else [])]
        self._kept = set(order[:most])

    def of(self, batch: RowsOfBatch) -> list[str]:
        """The sources of a batch's samples; empty where they were not recorded."""
        if len(batch.sources) != batch.followed.shape[1]:
            return []
        return [source if source in self._kept else _OTHERS for source in batch.sources]


def _row_text(run: RunData, batches: Sequence[RowsOfBatch], sources: _Sources) -> list[str]:
    share = float(np.mean([batch.followed.mean() for batch in batches]))
    who = "one choice for all layers" if batches[0].layers == (ALL_LAYERS,) else "every layer for itself"
    words = [f"Method {run.recipe.method}: of a batch's rows {percent(share)} were followed, {who}."]
    totals = {name: _share(batches, sources, name) for name in sources.names}
    if len(totals) > 1:
        parts = [f"“{name}” {percent(value)}" for name, value in totals.items() if value is not None]
        words.append(f"Followed by source: {listed(parts)}.")
    elif not sources.names:
        words.append("The sources of the rows are not recorded.")
    if all(batch.scores is None for batch in batches):
        words.append("The method needs no scores, so only its choices are shown.")
    return words


def _share(batches: Iterable[RowsOfBatch], sources: _Sources, name: str) -> float | None:
    """Share of a source's rows that were followed: the mean over layers; None where none came."""
    seen, followed = 0, 0.0
    for batch in batches:
        own = np.array([source == name for source in sources.of(batch)], bool)
        if own.any():
            seen += int(own.sum())
            followed += float(batch.followed[:, own].mean(0).sum())
    return followed / seen if seen else None


def _shares(run: RunData, batches: Sequence[RowsOfBatch], sources: _Sources) -> list[Figure]:
    """Shares followed by source over the run, in parts of it."""
    if not sources.names:
        return []
    split = np.array_split(np.arange(len(batches)), min(_BINS, len(batches)))
    parts = [part.tolist() for part in split if len(part)]
    lines = []
    for colour, name in enumerate(sources.names):
        points = [(batches[part[-1]].step, _share([batches[i] for i in part], sources, name)) for part in parts]
        pairs = [(float(step), share) for step, share in points if share is not None]
        lines.append(Line(name, [step for step, _ in pairs], [share for _, share in pairs], colour))
    note = "Share of the rows of each source that a layer followed in these steps, on average."
    chart = Chart("share followed", percent=True)
    return [line_chart("Shares followed", lines, chart, note, "half")]


def _one_batch(run: RunData, batch: RowsOfBatch, sources: _Sources) -> Figure:
    """Rows × layers of one batch: z-scores, and a dot where a layer follows a row."""
    kinds = sources.of(batch)
    order = sorted(range(batch.followed.shape[1]), key=lambda i: (kinds[i] if kinds else "", i))[:_LARGEST]
    labels = [_position(batch, kinds, i) for i in order]
    values_US = zscores(batch.scores) if batch.scores is not None else batch.followed.astype(float)
    low, unit = (-_BOUND, "z-score") if batch.scores is not None else (0.0, "followed")
    high = _BOUND if batch.scores is not None else 1.0
    marks = batch.followed.T[order] if batch.scores is not None else None
    cells = Cells(values_US.T[order], labels, _labels(batch), low, high, "layer", "row", unit, marks)
    note = (
        f"The last batch{'' if batch.followed.all() else ' of which rows were left out'}, at step {batch.step:,}. "
        "Numbers: places in the training rows."
        + (" Colour: a row's score against the others in that layer. Dot: the layer follows the row." if low else "")
    )
    return heat_map("Rows and layers of one batch", cells, note, "two-thirds")


def _position(batch: RowsOfBatch, kinds: Sequence[str], i: int) -> str:
    """The number of a row among the training rows, from 1, behind its source."""
    number = f"{batch.rows[i] + 1 if i < len(batch.rows) else i + 1}"
    return f"{cut(kinds[i], LABEL - 1 - len(number))} {number}" if kinds else f"row {number}"


def _by_source(run: RunData, batches: Sequence[RowsOfBatch], sources: _Sources) -> list[Figure]:
    """Sources × layers: mean z-scores over the run."""
    units = batches[0].layers
    sums = {name: np.zeros(len(units)) for name in sources.names}
    counts = dict.fromkeys(sources.names, 0)
    for batch in batches:
        kinds = sources.of(batch)
        if batch.scores is None or batch.layers != units or not kinds:
            continue
        z_US = np.nan_to_num(zscores(batch.scores))
        for place, name in enumerate(kinds):
            sums[name] += z_US[:, place]
            counts[name] += 1
    names = [name for name in sources.names if counts[name]]
    if len(names) < 2:
        return []
    values = np.stack([sums[name] / counts[name] for name in names])
    bound = max(float(np.abs(values).max()), _LEAST_Z)
    cells = Cells(values, names, _labels(batches[0]), -bound, bound, "layer", "source", "mean z-score")
    note = "Above zero: gradients of this source agree with the support rows more than others in their batch."
    return [heat_map("Alignment by source", cells, note, "half")]


def zscores(scores_US: NDArray[np.floating]) -> NDArray[np.float64]:
    """Scores as standard deviations from their mean over the batch, layer by layer; NaN where all are alike."""
    values = np.where(np.isfinite(scores_US), scores_US, np.nan).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = values.std(1, keepdims=True)
        z: NDArray[np.float64] = np.where(spread > 0, (values - values.mean(1, keepdims=True)) / spread, np.nan)
    return z


def _labels(batch: RowsOfBatch) -> list[str]:
    return ["all" if layer == ALL_LAYERS else str(layer) for layer in batch.layers]
