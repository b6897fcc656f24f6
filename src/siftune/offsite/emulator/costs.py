"""What every matrix of a layer would cost at several sizes, to share out by (`maths.allotment`) *(ours)*.

A matrix that is fitted to few rows loses little on them and more on others: v_proj's directions of SmolLM2 ten times as
much, where the MLP's channels lose four times as much. So one half of the calibration tokens chooses and fits, and the
costs are those on the other half. The kit itself is made from all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from siftune.base.files import Progress
from siftune.models.families import Family, family_of
from siftune.models.layers import find_layers
from siftune.models.streamed import tensor_of
from siftune.offsite.emulator.compress import (
    Compression,
    LayerCurvature,
    channel_count,
    layer_curvature,
    score_channels,
    write_columns,
)
from siftune.offsite.emulator.model import weight_OI
from siftune.offsite.emulator.record import replay
from siftune.offsite.emulator.recording import Captured, Recording
from siftune.offsite.maths.allotment import water_fill
from siftune.offsite.maths.drd import component_scores, components, joint_costs, keep_components, rank_of
from siftune.offsite.maths.kfac import cost
from siftune.offsite.maths.scp import keep_channels

SHARES = tuple(number / 20 for number in range(2, 21))  # at 1 a matrix is whole, and costs nothing


def measured_paths(family: Family) -> tuple[str, ...]:
    """What has a share: the matrices of attention, and for all of the MLP, the one that writes."""
    return (*family.attention, family.writes)


def layer_costs(layer: nn.Module, family: Family, captured: Mapping[str, Captured], how: Compression) -> list[Tensor]:
    """Parameters and costs of a layer's matrices at every share of `SHARES`.

    `captured` is what those of `how.judged` saw; what the settings keep has no part.

    Returns:
        (2, S) float64 for each of `measured_paths`: parameters, then what is lost.
    """
    chosen = layer_curvature(_half(captured, False), bool(how.lambda_attn or how.lambda_mlp))
    other = layer_curvature(_half(captured, True), False)
    weights = {
        path: weight_OI(layer.get_submodule(path), tensor_of(layer, f"{path}.weight")).float()
        for path in family.matrices
    }
    return [
        *(_factored(path, weights[path], (chosen, other), how) for path in family.attention),
        _narrowed(weights, family, (chosen, other), how),
    ]


def _half(captured: Mapping[str, Captured], second: bool) -> dict[str, Captured]:
    """The first or second half of the tokens; matrices that read the same tensor still share it."""
    inputs: dict[int, Tensor] = {}
    found = {}
    for path, seen in captured.items():
        middle = len(seen.x_NI) // 2
        part = slice(middle, None) if second else slice(middle)
        x_NI = inputs.setdefault(id(seen.x_NI), seen.x_NI[part])
        found[path] = Captured(x_NI, seen.g_NO[part])
    return found


def _factored(path: str, weight: Tensor, seen: Sequence[LayerCurvature], how: Compression) -> Tensor:
    """A matrix that becomes a product of two."""
    chosen, other = (half.curvature[path] for half in seen)
    parts = components(weight, chosen, how.basis, how.damping)
    scores_K = component_scores(parts, chosen, how.lambda_attn)
    ranks = [rank_of(share, *weight.shape) for share in SHARES[:-1]]
    kept = [keep_components(scores_K, parts.size_K, rank, how.protect) for rank in ranks]
    sizes = [float(rank * sum(weight.shape)) for rank in ranks]
    return _table([*sizes, float(weight.numel())], [*joint_costs(parts, other, kept), 0.0])


def _narrowed(
    weights: Mapping[str, Tensor], family: Family, seen: Sequence[LayerCurvature], how: Compression
) -> Tensor:
    """An MLP that loses channels: what is lost is what it writes."""
    chosen, other = seen
    write_OC, channels = weights[family.writes], weights[family.writes].shape[1]
    per_channel = sum(weights[path].numel() for path in (*family.reads, family.writes)) // channels
    scores_C = score_channels(weights, family, chosen, how)
    counts = [channel_count(share, channels) for share in SHARES[:-1]]
    costs = []
    for count in counts:
        staying = keep_channels(scores_C, count)
        delta_OC = -write_OC
        delta_OC[:, staying] += write_columns(write_OC, chosen.curvature[family.writes], staying, how)
        costs.append(cost(other.curvature[family.writes], delta_OC))
    return _table([float(count * per_channel) for count in (*counts, channels)], [*costs, 0.0])


def _table(sizes: Sequence[float], costs: Sequence[float]) -> Tensor:
    return torch.tensor([sizes, costs], dtype=torch.float64)


def measured_shares(
    model: nn.Module, recording: Recording, how: Compression, progress: Progress | None = None
) -> dict[int, dict[str, float]]:
    """Share out what is kept, `how.keep` of the parameters of all the middle's matrices, by what each costs.

    Layers are run one after the other; costs lie with the recording's states, so that a run that was cut goes on.

    Returns:
        Number of the layer -> path -> share.
    """
    family, layers = family_of(getattr(model, "config", None)), find_layers(model).layers
    known = recording.costs(replace(how, keep=1.0))  # costs do not depend on it
    tables: dict[tuple[int, str], tuple[list[float], list[float]]] = {}
    for done, number in enumerate(recording.numbers, 1):
        if not known.has(number):
            captured = replay(layers[number], recording, number, how.judged(family))
            known.put(number, layer_costs(layers[number], family, captured, how))
        for path, table in zip(measured_paths(family), known.get(number), strict=True):
            sizes, costs = table.tolist()
            tables[number, path] = sizes, costs
        if progress is not None:
            progress("measuring", done, len(recording.numbers))
    every = [sizes for sizes, _ in tables.values()]
    chosen = water_fill(every, [costs for _, costs in tables.values()], how.keep * sum(one[-1] for one in every))
    found: dict[int, dict[str, float]] = {number: {} for number in recording.numbers}
    for (number, path), place in zip(tables, chosen, strict=True):
        found[number][path] = SHARES[place]
    return found
