"""Weights in 4 bits stay as they are: bitsandbytes packs them for inference, after which no gradient comes through.

It does so on processors with AVX-512 for bfloat16, in the first pass in eval mode whose input needs no gradient, such
as an evaluation or a comparison of layers. From then on no gradient goes back through the matrix, with a warning at
most, and shapes that its blocks do not divide fail.
"""

from collections.abc import Sequence

from torch import nn

from siftune.errors import UnsupportedError

_SWITCH = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit: whether it packs
_PACKED = "packing_format_for_cpu"  # of the state beside its weight: whether it has


class KeptUnpacked:
    """Has no matrix of a model packed until `remove()`; the model must not have packed ones.

    Args:
        model: A model, quantised or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: Sequence[nn.Module] = [m for m in model.modules() if getattr(m, _SWITCH, False)]
        self._switch(False)

    def remove(self) -> None:
        """Let bitsandbytes pack what it would have; calling it twice does no harm."""
        self._switch(True)
        self._modules = ()

    def _switch(self, packs: bool) -> None:
        for module in self._modules:
            setattr(module, _SWITCH, packs)


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
