"""PEFT's other adapters of linear modules: VeRA, LoHa, LoKr, OFT and BOFT.

What of a recipe is PEFT's r, alpha or block size says CARRIERS; all else is as PEFT has it. A row's gradient has no
closed form here: see `engine.generic_rows`.
"""

from peft import BOFTConfig, LoHaConfig, LoKrConfig, OFTConfig, PeftConfig, VeraConfig
from torch import nn

from siftune.models.adapters.attach import chosen_linears, short_names, transposed
from siftune.models.adapters.registry import Shape

_ALIKE = {"task_type": "CAUSAL_LM"}


def _targets(model: nn.Module, shape: Shape) -> list[str]:
    return short_names(model, chosen_linears(model, shape))


def vera(model: nn.Module, shape: Shape) -> PeftConfig:
    """Config of VeRA, two vectors in each module beside random matrices that all modules share and none trains."""
    chosen = chosen_linears(model, shape)
    names, fan_in_fan_out = short_names(model, chosen), transposed(chosen)
    return VeraConfig(
        r=shape.rank, vera_dropout=shape.dropout, target_modules=names, fan_in_fan_out=fan_in_fan_out, **_ALIKE
    )


def loha(model: nn.Module, shape: Shape) -> PeftConfig:
    """Config of LoHa, the elementwise product of two low-rank matrices."""
    return LoHaConfig(r=shape.rank, alpha=shape.alpha, target_modules=_targets(model, shape), **_ALIKE)


def lokr(model: nn.Module, shape: Shape) -> PeftConfig:
    """Config of LoKr, the Kronecker product of two small matrices, the larger of which is of low rank."""
    return LoKrConfig(r=shape.rank, alpha=shape.alpha, target_modules=_targets(model, shape), **_ALIKE)


def oft(model: nn.Module, shape: Shape) -> PeftConfig:
    """Config of OFT, rotations of blocks of a module's inputs; the rank is the size of a block."""
    return OFTConfig(r=0, oft_block_size=shape.rank, target_modules=_targets(model, shape), **_ALIKE)


def boft(model: nn.Module, shape: Shape) -> PeftConfig:
    """Config of BOFT, products of such rotations in the order of a butterfly, and a scale for each output."""
    return BOFTConfig(boft_block_size=shape.rank, target_modules=_targets(model, shape), **_ALIKE)
