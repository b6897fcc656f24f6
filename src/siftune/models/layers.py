"""Decoder layers of a causal language model, and attention and MLP in them, by structure rather than by class.

The decoder layers are the longest `nn.ModuleList` of similar blocks next to the input embeddings:

* *Blocks* have modules of their own, so lists of projections or norms do not count.
* *Similar* blocks have one class, or classes of one source file (models that alternate attention with state-space
  or cross-attention blocks), or forward methods with the same parameter names.
* *Outermost*: a list inside a layer, such as the experts of a mixture, never counts.
* *Next to the embeddings*: in the innermost module that holds both the input embeddings and such a list. So a
  vision-language model yields its language model's layers, not those of the vision tower.

A *sublayer*, attention or MLP, is a child of the layer with a name that transformers uses for one; OPT's MLP alone is
two linear modules of the layer itself. A sublayer *writes* through the linear module that only dropout, a norm and the
residual follow. If it has no such module of its own, it writes through its own output. Examples are mixtures of
experts, and Mamba's mixers, whose output matrix is read past any adapter.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from siftune.base.errors import AdapterError, LayerError
from siftune.models.modules import is_linear, is_mamba

# attributes in which wrappers (DDP, torch.compile, PEFT, FSDP, activation checkpointing) hold the wrapped module
_TRANSPARENT = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED = ("module", "base_model", "model", *_TRANSPARENT)


@dataclass(frozen=True)
class DecoderLayers:
    """Decoder layers of a model.

    Attributes:
        path: Full dotted path of their list in the model that was searched, wrappers included.
        layers: The layers, from the embeddings to the head.
    """

    path: str
    layers: list[nn.Module]


def find_layers(model: nn.Module, path: str | None = None) -> DecoderLayers:
    """Find the decoder layers of a causal language model.

    Args:
        model: Any causal language model, also inside PEFT, DDP, `torch.compile` or FSDP.
        path: Dotted path of the list of layers, if the structure is ambiguous. Prefixes that wrappers add may be
            left out: "model.layers" also finds "base_model.model.model.layers".

    Returns:
        The layers and the full path of their list.

    Raises:
        LayerError: There is no list of similar blocks, or several of the same length, or the model has an encoder
            as well, or there is no list under `path`. The message names the lists of the model.

    Example:
        >>> layers = find_layers(base)
        >>> layers.path, len(layers.layers)
        ('model.layers', 4)
    """
    if path is not None:
        return _at_path(model, path)
    owner, embeddings = _input_embeddings(model)
    candidates = _nearest(_outermost_lists(model, embeddings), embeddings)
    if not candidates:
        raise LayerError(f"{type(model).__name__} has no list of similar decoder layers; {_advice(model)}")
    length = max(len(blocks) for blocks in candidates.values())
    longest = {name: blocks for name, blocks in candidates.items() if len(blocks) == length}
    if len(longest) > 1 or getattr(getattr(owner, "config", None), "is_encoder_decoder", False):
        raise LayerError(
            f"{type(model).__name__} has several lists that may be its decoder layers: "
            f"{_listing(longest if len(longest) > 1 else candidates)}; {_advice(model)}"
        )
    ((name, blocks),) = longest.items()
    return DecoderLayers(name, list(blocks))


def _at_path(model: nn.Module, path: str) -> DecoderLayers:
    """Resolve a user's path; among several matches, the one under the fewest wrappers."""
    matches = {name: m for name, m in model.named_modules() if name == path or _is_wrapped(name, path)}
    for name in sorted(matches, key=len):
        blocks = matches[name]
        if isinstance(blocks, nn.ModuleList | nn.Sequential) and len(blocks):
            return DecoderLayers(name, list(blocks))
    classes = ", ".join(f"a {type(m).__name__}" for m in matches.values()) or "nothing"
    raise LayerError(f"{type(model).__name__} has no list of layers at {path!r} but {classes}; {_advice(model)}")


def _is_wrapped(name: str, path: str) -> bool:
    """Whether `name` is `path` behind wrappers only."""
    prefix = name.removesuffix("." + path)
    return prefix != name and all(part in _WRAPPED for part in prefix.split("."))


def _input_embeddings(model: nn.Module) -> tuple[nn.Module, str | None]:
    """Return the outermost module with input embeddings, and their path in `model`."""
    for module in model.modules():
        getter = getattr(module, "get_input_embeddings", None)
        try:
            embeddings = getter() if callable(getter) else None
        except NotImplementedError:
            continue  # transformers raises it if a module has none; one inside or around it may have
        paths = [name for name, m in model.named_modules() if m is embeddings]
        if paths:
            return module, paths[0]
    # a model outside transformers: its first embedding is that of the tokens
    first = (name for name, m in model.named_modules() if isinstance(m, nn.Embedding))
    return model, next(first, None)


def _outermost_lists(model: nn.Module, embeddings: str | None) -> dict[str, nn.ModuleList]:
    """Collect the lists of similar blocks that are in no other such list and do not hold the embeddings."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(outer + ".") for outer in lists)
        holds_embeddings = embeddings is not None and embeddings.startswith(name + ".")
        if isinstance(module, nn.ModuleList) and not nested and not holds_embeddings and _are_similar(module):
            lists[name] = module
    return lists


def _are_similar(blocks: nn.ModuleList) -> bool:
    """Whether the blocks of a list are similar, each with modules of its own."""
    inner = [_unwrap(block) for block in blocks]
    if not inner or any(next(block.children(), None) is None for block in inner):
        return False
    classes = {type(block) for block in inner}
    files = {cls.__module__ for cls in classes}
    signatures = {tuple(inspect.signature(cls.forward).parameters) for cls in classes}
    return min(len(classes), len(files), len(signatures)) == 1


def _unwrap(module: nn.Module) -> nn.Module:
    """Look through `torch.compile`, FSDP and checkpoint wrappers around one layer."""
    for name in _TRANSPARENT:
        inner = module._modules.get(name)
        if inner is not None:
            return _unwrap(inner)
    return module


def _nearest(lists: dict[str, nn.ModuleList], embeddings: str | None) -> dict[str, nn.ModuleList]:
    """Select the lists of the innermost module that holds both the embeddings and a list."""
    scope = embeddings or ""
    while scope:
        scope = scope.rpartition(".")[0]
        inside = {name: m for name, m in lists.items() if not scope or name.startswith(scope + ".")}
        if inside:
            return inside
    return lists


def _listing(lists: dict[str, nn.ModuleList]) -> str:
    """Name lists with their lengths and the classes of their blocks."""

    def classes(blocks: nn.ModuleList) -> str:
        return "/".join(sorted({type(_unwrap(block)).__name__ for block in blocks}))

    return ", ".join(f"{name} ({len(blocks)} × {classes(blocks)})" for name, blocks in lists.items())


def _advice(model: nn.Module) -> str:
    """Name every list of modules in the model, and say how to choose one."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    shown = dict(list(lists.items())[:12])
    more = f" and {len(lists) - len(shown)} more" if len(lists) > len(shown) else ""
    example = next(iter(lists), "model.layers")
    return (
        f"lists of modules in it: {_listing(shown) or 'none'}{more}; "
        f'pass the path of the decoder layers, e.g. find_layers(model, "{example}")'
    )


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states among a decoder layer's arguments; (B, T, H)."""
    hidden: Tensor = args[0] if args and isinstance(args[0], Tensor) else kwargs["hidden_states"]
    return hidden


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply `change` to the hidden states among a decoder layer's arguments."""
    if args and isinstance(args[0], Tensor):
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def layer_numbers(depth: int, layers: Sequence[int]) -> tuple[int, ...]:
    """Resolve numbers of layers, from -depth to depth − 1, into numbers from 0, ascending, each once.

    Raises:
        LayerError: There is no such layer, or none at all.
    """
    wrong = [number for number in layers if not -depth <= number < depth]
    if wrong or not layers:
        raise LayerError(
            f"the model has {depth} layers, so `layers` takes numbers from 0 to {depth - 1}, or from -{depth} to -1 "
            f"counted from the end; found {wrong[0] if wrong else 'none'}"
        )
    return tuple(sorted({number % depth for number in layers}))


def inside(model: nn.Module, modules: dict[str, nn.Module], layers: Sequence[int] | None) -> dict[str, nn.Module]:
    """Select the modules, by full name, that are in some layers; None: all.

    Raises:
        AdapterError: No module is.
        LayerError: There is no such layer, or the layers cannot be found.
    """
    if layers is None:
        return modules
    stack = find_layers(model)
    places = tuple(f"{stack.path}.{number}." for number in layer_numbers(len(stack.layers), layers))
    selected = {name: module for name, module in modules.items() if name.startswith(places)}
    if not selected:
        raise AdapterError(
            f"none of the modules that `targets` names is in the layers {', '.join(map(str, layers))}; give other "
            "targets or layers"
        )
    return selected


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
    reads: str  # full name of the module whose first argument is the sublayer's input, the hidden states
    writes: str  # full name of the module whose output is added to the hidden states


def find_sublayers(model: nn.Module) -> list[Sublayer]:
    """Find attention and MLP of every decoder layer that has them.

    Raises:
        LayerError: The layers cannot be found.
    """
    stack = find_layers(model)
    return [
        sublayer
        for number, layer in enumerate(stack.layers)
        for sublayer in _of_layer(number, f"{stack.path}.{number}", layer)
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
    own = [] if is_mamba(block) else [key for key in _WRITES[part] if _holds_linear(getattr(block, key, None))]
    return f"{name}.{own[0]}" if own else name


def _holds_linear(module: nn.Module | None) -> bool:
    """Whether a module is linear, or an adapter around one that is."""
    inner = getattr(module, "base_layer", module)
    return isinstance(inner, nn.Module) and is_linear(inner)
