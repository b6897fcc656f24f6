"""Weights in 4 bits stay as they are: bitsandbytes packs them for inference, after which no gradient comes through.

It does so on processors with AVX-512 for bfloat16, in the first pass in eval mode whose input needs no gradient, such
as an evaluation or a comparison of layers. From then on no gradient goes back through the matrix, with a warning at
most, and shapes that its blocks do not divide fail.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import nn

from siftune.base.errors import UnsupportedError

_SWITCH = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit: whether it packs
_PACKED = "packing_format_for_cpu"  # of the state beside its weight: whether it has

_kept: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # matrices -> how many keep them as they are


class KeptUnpacked:
    """Has no matrix of a model packed until `remove()`, of every one that there is; none may be packed already.

    Args:
        model: A model, quantised or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: Sequence[nn.Module] = [m for m in model.modules() if m in _kept or getattr(m, _SWITCH, False)]
        for module in self._modules:
            _kept[module] = _kept.get(module, 0) + 1
            setattr(module, _SWITCH, False)

    def remove(self) -> None:
        """Let bitsandbytes pack what it would have, unless somebody else does not; calling it twice does no harm."""
        for module in self._modules:
            _kept[module] -= 1
            if not _kept[module]:
                del _kept[module]
                setattr(module, _SWITCH, True)
        self._modules = ()


def refuse_packed(model: nn.Module) -> None:
    """Refuse a model that a pass in eval mode has packed already.

    Raises:
        UnsupportedError: One of its matrices is packed.
    """
    for name, module in model.named_modules():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), _PACKED, False):
            raise UnsupportedError(
                f"bitsandbytes has packed the 4-bit weights of {name} for inference, in a pass in eval mode, and no "
                "gradient comes through them any more: load the model again, and evaluate or generate nothing before "
                "training"
            )
