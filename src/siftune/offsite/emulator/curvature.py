"""Curvature of a layer's matrices: on all calibration tokens, or on either half of them.

Measuring costs takes the two halves, and compression later the whole. The whole is the halves' sum. So it is kept from
one to the other where it is smaller than what the matrices saw, which a layer would otherwise compute again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from siftune.offsite.emulator.record import Captured, States
from siftune.offsite.maths.drd import Components
from siftune.offsite.maths.kfac import Curvature, Moments, moments


@dataclass
class LayerCurvature:
    """Curvature of a layer's matrices, and what was computed from it already."""

    curvature: Mapping[str, Curvature] = field(default_factory=dict)  # by path of the matrix
    # components by path and basis, so that several λ and ranks cost one decomposition
    components: dict[tuple[str, str, float], Components] = field(default_factory=dict)


@dataclass(frozen=True)
class Halves:
    """Curvature of a layer's matrices on the two halves of the calibration tokens."""

    chosen: LayerCurvature  # by which is chosen and fitted
    other: LayerCurvature  # in which costs are measured


def layer_curvature(captured: Mapping[str, Captured], slopes: bool = True) -> LayerCurvature:
    """Curvature of the matrices of a layer, by path; those that read the same tensor share their input moments.

    Without `slopes`, where every λ is 0, zeros stand for D.
    """
    inputs: dict[int, Moments] = {}
    curvature = {}
    for path, seen in captured.items():
        if id(seen.x_NI) not in inputs:
            inputs[id(seen.x_NI)] = moments(seen.x_NI)
        taken, given = inputs[id(seen.x_NI)], moments(seen.g_NO)
        curvature[path] = Curvature(taken, given, seen.g_NO.T @ seen.x_NI) if slopes else _flat(taken, given)
    return LayerCurvature(curvature)


def _flat(inputs: Moments, gradients: Moments) -> Curvature:
    """Curvature with zeros for D, which take no memory."""
    return Curvature(inputs, gradients, inputs.values.new_zeros(()).expand(gradients.features, inputs.features))


def halves(captured: Mapping[str, Captured], slopes: bool) -> Halves:
    """Curvature on either half of what a layer's matrices saw, with slopes for λ."""
    return Halves(layer_curvature(_half(captured, False), slopes), layer_curvature(_half(captured, True), False))


def _half(captured: Mapping[str, Captured], second: bool) -> dict[str, Captured]:
    """The first or second half of the tokens; matrices that read the same tensor still share it."""
    inputs: dict[int, Tensor] = {}
    parts = {}
    for path, seen in captured.items():
        middle = len(seen.x_NI) // 2
        part = slice(middle, None) if second else slice(middle)
        x_NI = inputs.setdefault(id(seen.x_NI), seen.x_NI[part])
        parts[path] = Captured(x_NI, seen.g_NO[part])
    return parts


def keep_whole(kept: States, number: int, seen: Halves, tokens: int) -> None:
    """Keep the sum of a layer's halves, if all moments are matrices: else the tokens are fewer, and are smaller.

    Args:
        kept: Where to.
        number: Number of the layer.
        seen: Its halves; their slopes are not kept.
        tokens: N, tokens of both halves.
    """
    chosen, other = seen.chosen.curvature, seen.other.curvature
    readers_of: dict[int, list[str]] = {}  # matrices that read the same tensor
    for path, one in chosen.items():
        readers_of.setdefault(id(one.inputs), []).append(path)
    pairs = {f"gradients {path}": (chosen[path].gradients, other[path].gradients) for path in chosen}
    for readers in readers_of.values():
        pairs[" ".join(("inputs", *readers))] = chosen[readers[0]].inputs, other[readers[0]].inputs
    if all(part.formed for pair in pairs.values() for part in pair):
        share = (tokens // 2) / tokens
        kept.put_named(number, {name: torch.lerp(b.values, a.values, share) for name, (a, b) in pairs.items()})


def kept_whole(kept: States, number: int, paths: Sequence[str], device: torch.device) -> LayerCurvature | None:
    """A layer's curvature without slopes, as `keep_whole` left it; None if that of a matrix is not there."""
    if not kept.has(number):
        return None
    found: dict[str, dict[str, Moments]] = {"inputs": {}, "gradients": {}}
    for name, values in kept.get_named(number).items():
        kind, *readers = name.split(" ")
        found[kind] |= dict.fromkeys(readers, Moments(values.to(device), True))
    if not set(paths) <= set(found["inputs"]):
        return None
    return LayerCurvature({path: _flat(found["inputs"][path], found["gradients"][path]) for path in paths})
