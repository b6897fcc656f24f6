"""Several returns of one kit become one update of the base's outer layers; the maths is in `maths.merging`.

What is merged is what each return changes, W_n − W. So of LoRA's factors it is their products that are merged, each in
full and in float64: the product of two means is not the mean of two products. One tensor after the other is read of all
returns; beside the result, no more of them is in memory at a time.

Two returns whose updates point the same way, with a cosine above .999 *(ours)*, are one return with two votes, in
whatever form and size the second one comes. That finds mistakes and plain copies. Somebody who adds noise to a copy is
not found: the owner has to know from whom each return is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from siftune.base.errors import KitError
from siftune.base.numerics import in_float64
from siftune.offsite.exchange.returned import OpenReturn, Tuned, is_thin
from siftune.offsite.exchange.updates import Part, compare, rounded_like
from siftune.offsite.kit.strict import about
from siftune.offsite.maths.merging import mean, shares

_SAME = 0.999  # cosine of two updates


@dataclass(frozen=True)
class Candidate:
    """A return beside the base."""

    tuned: Mapping[str, Tensor]  # the outer layers with it in them
    part: Part


def candidates(
    before: Mapping[str, Tensor], returns: Sequence[Mapping[str, Tensor]], limit: float, model_type: str
) -> list[Candidate]:
    """Hold every return to the base and to the limit, as if it were the only one.

    Args:
        before: The base's outer layers by neutral name.
        returns: What the returns hold.
        limit: Relative updates of tensors must stay below it.
        model_type: Family of the base, in transformers' words.

    Raises:
        KitError: A return does not fit, or moved too far; or they are of two kinds. Named is which.
        RecipeError: The limit is no number above 0.
    """
    names = [str(r.path) if isinstance(r, OpenReturn) else str(place) for place, r in enumerate(returns, 1)]
    _check_together(names, returns)
    checked = []
    for name, returned in zip(names, returns, strict=True):
        with about(f"return {name}" if len(names) > 1 else ""):
            tuned = Tuned(before, returned)
            report = compare(before, tuned, limit, model_type)
            report.check()
        privacy = returned.privacy if isinstance(returned, OpenReturn) else None
        checked.append(Candidate(tuned, Part(name, report, privacy=privacy)))
    return checked


def _check_together(names: Sequence[str], returns: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuse returns of two kinds."""
    thin = [name for name, returned in zip(names, returns, strict=True) if is_thin(returned)]
    if whole := [name for name in names if name not in thin] if thin else []:
        raise KitError(
            f"return {thin[0]} holds LoRA's factors and return {whole[0]} whole layers, as after full tuning, or "
            "LoRA of a rank whose factors would be larger: merge returns of one kind, and plug the others in by "
            "themselves"
        )


def merged(
    before: Mapping[str, Tensor], returns: Sequence[Candidate], weights: Sequence[float] | None
) -> tuple[dict[str, Tensor], list[Part]]:
    """Merge returns, from `candidates`, by checked weights.

    Returns:
        The outer layers with the merged update in them, in float32 or wider, and what became of every return. Whole
        tensors of a single return are as they came, unless the base has more digits.

    Raises:
        KitError: Two returns make the same update.
    """
    if len(returns) == 1:
        [one] = returns
        moves = one.part.report.whole.change > 0
        single = {name: _of_one(old.detach(), one.tuned[name].detach()) for name, old in before.items()}
        return single, [replace(one.part, cosine=1.0 if moves else None)]
    norms = [candidate.part.report.whole.change for candidate in returns]
    weights = shares(weights or [1.0] * len(returns))
    values, dots, square = {}, torch.zeros(len(returns), dtype=torch.float64), 0.0
    gram_NN = torch.zeros(len(returns), len(returns), dtype=torch.float64)
    for name, old in before.items():
        old = old.detach()
        updates_NX = torch.stack([_update(old, candidate.tuned[name].detach()) for candidate in returns])
        update_X = mean(updates_NX, weights)
        values[name] = _stored(in_float64(old) + update_X, old)
        flat_NX = updates_NX.reshape(len(returns), -1)
        dots += (flat_NX @ update_X.flatten()).cpu()
        gram_NN += (flat_NX @ flat_NX.T).cpu()
        square += float(update_X.square().sum())
    _refuse_the_same(gram_NN, [candidate.part.name for candidate in returns])
    return values, [
        replace(
            candidate.part,
            weight=weight,
            cosine=float(dot) / (norm * math.sqrt(square)) if norm * square else None,
        )
        for candidate, weight, norm, dot in zip(returns, weights, norms, dots, strict=True)
    ]


def _of_one(before: Tensor, after: Tensor) -> Tensor:
    """A tensor of a single return; a base that is wider than the kit keeps what the kit rounded."""
    if torch.promote_types(before.dtype, after.dtype) == after.dtype:
        return _stored(after, before)
    return _stored(in_float64(before) + _update(before, after), before)


def _update(before: Tensor, after: Tensor) -> Tensor:
    """What a return changes of a tensor, in float64; the kit had it in the return's dtype."""
    old = rounded_like(before, after)
    return in_float64(after.to(old.device)) - in_float64(old)


def _refuse_the_same(gram_NN: Tensor, names: Sequence[str]) -> None:
    """Refuse two returns that make the same update, by the products of all updates with each other."""
    norms_N = gram_NN.diagonal().sqrt()
    same_NN = gram_NN > _SAME * norms_N.outer(norms_N)  # never of an update that is zero
    for first, second in same_NN.triu(1).nonzero().tolist()[:1]:
        raise KitError(
            f"the returns {names[first]} and {names[second]} make the same update: give one of them; beside "
            "others, --weights says what it counts"
        )


def _stored(tensor: Tensor, before: Tensor) -> Tensor:
    """A tensor in float32, or in float64 where the base is; narrower ones as they came."""
    wide = torch.promote_types(before.dtype, torch.float32)
    return tensor.to(wide) if tensor.dtype == torch.float64 else tensor
