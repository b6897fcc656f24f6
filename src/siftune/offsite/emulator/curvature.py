"""Curvature of a layer's matrices: on all calibration tokens, or on either half of them.

Batches are summed as they come, so that memory does not grow with their number.

Measuring costs takes the two halves, and compression later the whole. The whole is the halves' sum. So it is kept from
one to the other where it is smaller than what the matrices saw, which a layer would otherwise compute again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from siftune.offsite.emulator.record import Captured, States
from siftune.offsite.maths.drd import Components
from siftune.offsite.maths.kfac import Curvature, Moments, MomentSum


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


_AT_ONCE = 8192  # tokens in a product; sums of fewer at a time in float32 would round more


class Sums:
    """Curvature of the matrices of a layer, summed over batches; those that read the same tensor share their moments.

    Args:
        tokens: N, tokens of all batches.
        slopes: Whether to sum D; where every λ is 0, zeros stand for it.
    """

    def __init__(self, tokens: int, slopes: bool = True) -> None:
        self._tokens, self._slopes = tokens, slopes
        self._waiting: list[Mapping[str, Captured]] = []
        self._count = 0  # tokens that wait
        self._leader: dict[str, str] = {}  # path -> the first one that reads the same tensor
        self._inputs: dict[str, MomentSum] = {}  # of leaders
        self._gradients: dict[str, MomentSum] = {}
        self._slope: dict[str, Tensor] = {}

    def add(self, seen: Mapping[str, Captured]) -> None:
        """Add what the matrices saw in a batch."""
        self._waiting.append(seen)
        self._count += _tokens(seen)
        if self._count >= _AT_ONCE:
            self._sum()

    def curvature(self) -> LayerCurvature:
        """The curvature, once all is added."""
        if self._waiting:
            self._sum()
        inputs = {path: one.moments() for path, one in self._inputs.items()}
        curvatures = {}
        for path, gradients in self._gradients.items():
            x, g = inputs[self._leader[path]], gradients.moments()
            curvatures[path] = Curvature(x, g, self._slope[path]) if self._slopes else _flat(x, g)
        return LayerCurvature(curvatures)

    def _sum(self) -> None:
        seen = joined(self._waiting)
        self._waiting, self._count = [], 0
        first: dict[int, str] = {}
        for path, one in seen.items():
            leader = first.setdefault(id(one.x_NI), path)
            if leader == path:
                self._inputs.setdefault(path, MomentSum(self._tokens)).add(one.x_NI)
            self._leader[path] = leader
            self._gradients.setdefault(path, MomentSum(self._tokens)).add(one.g_NO)
            if self._slopes:
                slope_OI = one.g_NO.T @ one.x_NI
                self._slope[path] = self._slope[path] + slope_OI if path in self._slope else slope_OI


def joined(parts: Sequence[Mapping[str, Captured]]) -> dict[str, Captured]:
    """What matrices saw in several batches; those that read the same tensor still share it."""
    inputs: dict[tuple[int, ...], Tensor] = {}
    captures = {}
    for path in parts[0]:
        own = [part[path] for part in parts]
        key = tuple(id(one.x_NI) for one in own)
        if key not in inputs:
            inputs[key] = torch.cat([one.x_NI for one in own])
        captures[path] = Captured(inputs[key], torch.cat([one.g_NO for one in own]))
    return captures


def _tokens(seen: Mapping[str, Captured]) -> int:
    return len(next(iter(seen.values())).x_NI)


def _flat(inputs: Moments, gradients: Moments) -> Curvature:
    """Curvature with zeros for D, which take no memory."""
    return Curvature(inputs, gradients, inputs.values.new_zeros(()).expand(gradients.features, inputs.features))


class SumsOfHalves:
    """Curvature on the first and on the second half of all tokens, summed over batches.

    Args:
        tokens: N, tokens of all batches.
        slopes: Whether to sum D of the first half, for λ; it is scaled to the sum over all tokens, for the paper's λ.
    """

    def __init__(self, tokens: int, slopes: bool) -> None:
        self._first, self._second = Sums(tokens // 2, slopes), Sums(tokens - tokens // 2, False)
        self._left = tokens // 2  # tokens that the first half lacks
        self._scale = tokens / max(1, tokens // 2) if slopes else None  # of D

    def add(self, seen: Mapping[str, Captured]) -> None:
        """Add what the matrices saw in a batch."""
        count = _tokens(seen)
        middle = min(self._left, count)
        self._left -= middle
        if middle:
            self._first.add(_part(seen, slice(middle)))
        if middle < count:
            self._second.add(_part(seen, slice(middle, None)))

    def halves(self) -> Halves:
        """The curvature of both, once all is added."""
        first = self._first.curvature()
        if self._scale is not None:
            scaled = {path: replace(one, slope_OI=self._scale * one.slope_OI) for path, one in first.curvature.items()}
            first = LayerCurvature(scaled)
        return Halves(first, self._second.curvature())


def _part(seen: Mapping[str, Captured], tokens: slice) -> dict[str, Captured]:
    """A part of the tokens; matrices that read the same tensor still share it."""
    inputs: dict[int, Tensor] = {}
    return {
        path: Captured(inputs.setdefault(id(one.x_NI), one.x_NI[tokens]), one.g_NO[tokens])
        for path, one in seen.items()
    }


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
    moments: dict[str, dict[str, Moments]] = {"inputs": {}, "gradients": {}}
    for name, values in kept.get_named(number).items():
        kind, *readers = name.split(" ")
        moments[kind] |= dict.fromkeys(readers, Moments(values.to(device), True))
    if not set(paths) <= set(moments["inputs"]):
        return None
    return LayerCurvature({path: _flat(moments["inputs"][path], moments["gradients"][path]) for path in paths})
