"""Find attention and MLP in a decoder layer by its structure: where each is given hidden states, and where it writes.

A sublayer is a child of the layer that is called as attentions or MLPs are in transformers; OPT's MLP alone is two
linear modules of the layer itself. It *writes* by the linear module after which nothing but dropout, a norm and the
residual come. A child without such a module of its own (a mixture of experts, a mixer of Mamba, whose output matrix is
read past any adapter) writes by its own output.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from siftune.models.adapters.attach import is_linear, is_mamba
from siftune.models.layers import find_layers

_CHILDREN = {
    "attention": ("self_attn", "attn", "attention", "self_attention", "mixer", "mamba"),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
}
_WRITES = {
    "attention": ("o_proj", "out_proj", "c_proj", "dense", "output"),
    "mlp": ("down_proj", "c_proj", "fc_out", "dense_4h_to_h"),
}
_IN_THE_LAYER = ("fc1", "fc2")

PARTS = tuple(_CHILDREN)


@dataclass(frozen=True)
class Sublayer:
    """Attention or MLP of a decoder layer."""

    layer: int  # number of the layer, from 0
    part: str  # "attention" or "mlp"
    reads: str  # full name of the module whose first argument is the hidden states that the sublayer is given
    writes: str  # full name of the module whose output is what the sublayer adds to the hidden states


def find_sublayers(model: nn.Module) -> list[Sublayer]:
    """Find attention and MLP of every decoder layer, as far as a layer has them.

    Raises:
        LayerError: The layers cannot be found.
    """
    found = find_layers(model)
    return [
        sublayer
        for number, layer in enumerate(found.layers)
        for sublayer in _of_layer(number, f"{found.path}.{number}", layer)
    ]


def _of_layer(number: int, name: str, layer: nn.Module) -> Iterator[Sublayer]:
    for part, names in _CHILDREN.items():
        child = next((key for key in names if isinstance(getattr(layer, key, None), nn.Module)), None)
        if child is not None:
            reads = f"{name}.{child}"
            yield Sublayer(number, part, reads, _writes(part, reads, layer.get_submodule(child)))
        elif part == "mlp" and all(isinstance(getattr(layer, key, None), nn.Module) for key in _IN_THE_LAYER):
            yield Sublayer(number, part, *(f"{name}.{key}" for key in _IN_THE_LAYER))


def _writes(part: str, name: str, block: nn.Module) -> str:
    own = [] if is_mamba(block) else [key for key in _WRITES[part] if _is_linear(getattr(block, key, None))]
    return f"{name}.{own[0]}" if own else name


def _is_linear(module: nn.Module | None) -> bool:
    """Whether a module is linear, or an adapter around one that is."""
    inner = getattr(module, "base_layer", module)
    return isinstance(inner, nn.Module) and is_linear(inner)
