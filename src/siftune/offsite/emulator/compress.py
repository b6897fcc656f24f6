"""Compress one decoder layer: which directions of its matrices and which channels of its MLP stay.

GradOT, Yao et al., ACL 2025, arXiv 2507.04455: DRD on attention (`maths/drd.py`), and SCP on the MLP or *(ours)*
channels whose part the others take over (`maths/channels.py`). Layer drop drops whole layers (`plan.py`); the layers
that stay come through here unchanged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from siftune.models.families import Family
from siftune.offsite.emulator.curvature import LayerCurvature
from siftune.offsite.emulator.model import Base, LayerShape, features, weight_OI
from siftune.offsite.maths.channels import DAMPING as REFIT_DAMPING
from siftune.offsite.maths.channels import channel_scores, keep_channels, refit, refit_scores
from siftune.offsite.maths.drd import Basis, Components, components, factor, rank_of
from siftune.offsite.maths.kfac import DAMPING, Curvature, LambdaUnit

Method = Literal["gradot", "layerdrop"]
Mlp = Literal["refit", "channels"]
Parts = Literal["both", "attention", "mlp"]


@dataclass(frozen=True)
class Compression:
    """Settings of the compression of a layer.

    Attributes:
        method: gradot, or layerdrop.
        keep: Fraction of the parameters of its matrices that stays, in (0, 1]; at 1 nothing changes.
        parts: What is compressed: attention and MLP, or one of them, which leaves the other as it is.
        lambda_attn: λ of DRD: weight of a large loss gap against a small change of gradients; 0 or more.
        lambda_mlp: λ of what is done to the MLP.
        lambda_unit: Unit of both λ: relative to the terms' means *(ours)*, or the paper's.
        basis: Directions among which DRD chooses: singular vectors of the weight (the paper's), or *(ours)* of the
            weight between the roots of its curvature.
        mlp: Whether gradot takes channels out of the MLP (SCP, the paper's), or *(ours)* lets those that stay take over
            what the others wrote as well.
        protect: Share of the largest singular values that always stay.
        damping: *(ours)* Relative damping of those roots.
        refit_damping: *(ours)* Relative damping of the channels' fit.
        shares: *(ours)* Fractions in place of all these, by path of the matrix; that of the one that writes to the
            hidden state is the MLP's channels'. From a plan (`plan.py`), and not to be set.
    """

    method: Method = "gradot"
    keep: float = 0.7
    parts: Parts = "both"
    lambda_attn: float = 0.0
    lambda_mlp: float = 0.0
    lambda_unit: LambdaUnit = "relative"
    basis: Basis = "whitened"
    mlp: Mlp = "refit"
    protect: float = 0.05
    damping: float = DAMPING
    refit_damping: float = REFIT_DAMPING
    shares: Mapping[str, float] | None = field(default=None, hash=False)

    def share(self, path: str) -> float:
        """Fraction of a matrix that stays."""
        return self.keep if self.shares is None else self.shares[path]

    def judged(self, family: Family) -> tuple[str, ...]:
        """Matrices of whose curvature something is asked: those that channels read by only where these are scored."""
        attention = () if self.parts == "mlp" else family.attention
        if self.parts == "attention":
            return attention
        scored = family.reads if self.mlp == "channels" else ()
        return (*attention, *scored, family.writes)


@dataclass(frozen=True)
class CompressedLayer:
    """A layer of an emulator."""

    shape: LayerShape
    tensors: Mapping[str, Tensor]  # all its parameters and buffers, by name in the layer; matrices as (out, in)


def compress_layer(base: Base, number: int, seen: LayerCurvature, how: Compression) -> CompressedLayer:
    """Compress a decoder layer of the base model, which is left unchanged; in its dtype.

    Args:
        base: The base model.
        number: Number of the layer.
        seen: Curvature of its matrices; not needed if everything is kept.
        how: Settings.
    """
    layer, family = base.layers[number], base.family
    tensors: dict[str, Tensor] = dict(layer.state_dict())
    if how.keep >= 1:
        return CompressedLayer(LayerShape(number), tensors)
    ranks = dict[str, int]()
    for path in () if how.parts == "mlp" else family.attention:
        matrix = layer.get_submodule(path)
        inputs, outputs, _ = features(matrix)
        share = how.share(path)
        if share >= 1:
            continue
        rank = rank_of(share, outputs, inputs)
        up_OR, down_RI = _factors(path, weight_OI(matrix).detach(), seen, rank, how)
        dtype = tensors.pop(f"{path}.weight").dtype
        tensors[f"{path}.down.weight"], tensors[f"{path}.up.weight"] = down_RI.to(dtype), up_OR.to(dtype)
        if f"{path}.bias" in tensors:
            tensors[f"{path}.up.bias"] = tensors.pop(f"{path}.bias")
        ranks[path] = rank
    if how.parts == "attention" or how.share(family.writes) >= 1:
        return CompressedLayer(LayerShape(number, ranks), tensors)
    channels = _narrow(layer, family, tensors, seen, how)
    return CompressedLayer(LayerShape(number, ranks, channels), tensors)


def _factors(path: str, weight: Tensor, seen: LayerCurvature, rank: int, how: Compression) -> tuple[Tensor, Tensor]:
    """A matrix of attention as a product of two thinner ones."""
    parts = components_of(path, weight.float(), seen, how)
    return factor(parts, seen.curvature[path], rank, how.lambda_attn, how.protect, how.lambda_unit)


def components_of(path: str, weight: Tensor, seen: LayerCurvature, how: Compression) -> Components:
    """Components of a matrix of attention, computed once for all λ and ranks."""
    key = (path, how.basis, how.damping)
    if key not in seen.components:
        seen.components[key] = components(weight, seen.curvature[path], how.basis, how.damping)
    return seen.components[key]


def _narrow(
    layer: nn.Module, family: Family, tensors: dict[str, Tensor], seen: LayerCurvature, how: Compression
) -> int:
    """Take channels out of the MLP's tensors; return how many are left."""
    paths = (*family.reads, family.writes)
    weights = {path: weight_OI(layer.get_submodule(path)).detach() for path in paths}
    count = channel_count(how.share(family.writes), weights[family.writes].shape[1])
    staying = keep_channels(score_channels(weights, family, seen, how), count)
    for path in family.reads:
        tensors[f"{path}.weight"] = weights[path][staying].contiguous()
        if f"{path}.bias" in tensors:
            tensors[f"{path}.bias"] = tensors[f"{path}.bias"][staying].contiguous()
    name = f"{family.writes}.weight"
    columns = weights[family.writes][:, staying]
    if how.mlp == "refit":
        columns = refit(weights[family.writes], seen.curvature[family.writes].inputs, staying, how.refit_damping)
    tensors[name] = columns.to(tensors[name].dtype).contiguous()
    return count


def channel_count(share: float, channels: int) -> int:
    """Number of an MLP's channels that a share amounts to; at least one."""
    return max(1, int(share * channels + 1e-9))


def score_channels(weights: Mapping[str, Tensor], family: Family, seen: LayerCurvature, how: Compression) -> Tensor:
    """Scores of an MLP's channels; high ones should stay."""
    writes, curvature = weights[family.writes].float(), seen.curvature[family.writes]
    if how.mlp == "refit":
        return refit_scores(writes, curvature, how.lambda_mlp, how.refit_damping, how.lambda_unit)
    reads: Sequence[tuple[Tensor, Curvature]] = [(weights[p].float(), seen.curvature[p]) for p in family.reads]
    return channel_scores(reads, (writes, curvature), how.lambda_mlp, how.lambda_unit)
