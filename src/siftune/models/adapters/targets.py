"""Target modules of adapters: by default the linear modules of the decoder layers that see every token."""

from collections.abc import Iterator, Mapping, Sequence

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from siftune.base.errors import AdapterError
from siftune.models.adapters.registry import Shape
from siftune.models.layers import find_layers, inside, layer_numbers
from siftune.models.modules import expert_banks, expert_count, is_linear, is_mamba

_MAMBA_PARTS = {"x_proj", "dt_proj", "out_proj"}


def layer_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Collect the linear modules of the decoder layers that can have an adapter, by full name.

    Experts and routers are left out, and modules whose names PEFT takes for those of experts. Of Mamba's mixers only
    the input projection is included: fused kernels, or the model itself, read the other weights past any adapter.

    Raises:
        LayerError: The layers cannot be found.
        AdapterError: They have no linear module.
    """
    stack = find_layers(model)
    names = {module: name for name, module in model.named_modules()}
    linears = {names[m]: m for layer in stack.layers for m in layer.modules() if is_linear(m)}
    parts = {name for layer in stack.layers for name in (*_expert_parts(layer, names), *_mamba_parts(layer, names))}
    chosen = {n: m for n, m in linears.items() if not any(n == part or n.startswith(f"{part}.") for part in parts)}
    if any(expert_banks(layer) for layer in stack.layers):
        taken = {leaf for leaf in map(_leaf, chosen) if _means_experts(model, leaf)}
        chosen = {n: m for n, m in chosen.items() if _leaf(n) not in taken}
    if not chosen:
        raise AdapterError(
            f"the layers at {stack.path} have no linear module to adapt; name modules with `targets`, "
            f"out of: {_leaf_names(model)}"
        )
    return chosen


def named_modules(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """Collect the linear modules and embeddings whose names are, or end in, one of `targets`.

    Raises:
        AdapterError: A target matches nothing.
    """
    modules = {n: m for n, m in model.named_modules() if is_linear(m) or isinstance(m, nn.Embedding)}
    by_target = {target: {n: m for n, m in modules.items() if _ends_in(n, target)} for target in targets}
    missing = [target for target, matches in by_target.items() if not matches]
    if missing or not by_target:
        raise AdapterError(
            f"no linear module of {type(model).__name__} is called {' or '.join(missing) or '(targets is empty)'}; "
            f"available: {_leaf_names(model)}"
        )
    return {n: m for matches in by_target.values() for n, m in matches.items()}


def transposed(linears: Mapping[str, nn.Module]) -> bool:
    """Whether linear modules hold their weights as (in, out), as GPT-2's do."""
    return any(isinstance(module, Conv1D) for module in linears.values())


def chosen_linears(model: nn.Module, shape: Shape) -> dict[str, nn.Module]:
    """Collect the linear modules that a shape's targets name, by default `layer_linears`, in the shape's layers.

    Raises:
        AdapterError: A target matches nothing, or nothing in these layers.
        LayerError: As `layer_linears`.
    """
    chosen = layer_linears(model) if shape.targets is None else named_modules(model, shape.targets)
    return inside(model, chosen, shape.layers)


def short_names(model: nn.Module, chosen: dict[str, nn.Module]) -> list[str]:
    """Return the shortest ends of names that match the chosen modules and nothing else in the model."""
    everything = [name for name, _ in model.named_modules()]
    for parts in (1, 2, 3):
        ends = {".".join(name.split(".")[-parts:]) for name in chosen}
        if {name for name in everything if any(_ends_in(name, end) for end in ends)} == set(chosen):
            return sorted(ends)
    return sorted(chosen)


EXPERTS = "experts"  # among targets: the experts of a mixture


def expert_weights(model: nn.Module, layers: Sequence[int] | None) -> list[str]:
    """Name the weights of (experts, out, in) of all experts, in some layers or in all.

    Raises:
        AdapterError: There is none.
    """
    stack = find_layers(model)
    names = {module: name for name, module in model.named_modules()}
    chosen = range(len(stack.layers)) if layers is None else layer_numbers(len(stack.layers), layers)
    banks = [bank for number in chosen for bank in expert_banks(stack.layers[number])]
    weights = [
        f"{names[bank]}.{key}"
        for bank in banks
        for key, p in bank._parameters.items()
        if p is not None and p.dim() == 3
    ]
    if not weights:
        raise AdapterError(
            f"targets names {EXPERTS}, but {type(model).__name__} has no experts whose weights lie in one tensor; name "
            "linear modules"
        )
    return weights


def _expert_parts(layer: nn.Module, names: dict[nn.Module, str]) -> Iterator[str]:
    """Name the banks of experts in a layer, and the routers.

    Routers are the linear modules beside a bank with one output per expert, or with a single one (gates of shared
    experts).
    """
    for block in layer.modules():
        for count, bank in ((expert_count(child), child) for child in block.children()):
            if count:
                yield names[bank]
                linears = (m for m in block.modules() if is_linear(m))
                yield from (names[m] for m in linears if getattr(m, "out_features", None) in (1, count))


def _mamba_parts(layer: nn.Module, names: dict[nn.Module, str]) -> Iterator[str]:
    """Name the linear modules of Mamba's mixers whose weights are used without calling them."""
    for mixer in layer.modules():
        if is_mamba(mixer):
            yield from (names[part] for name, part in mixer.named_children() if name in _MAMBA_PARTS)


def _means_experts(model: nn.Module, target: str) -> bool:
    """Whether PEFT puts an adapter on experts if this name is targeted.

    For some mixtures it takes `gate_proj` for a part of the experts, as the name was before transformers fused them,
    though a dense layer or a shared expert has a module of that name.
    """
    # imported only if adapters are made: methods also run inside tools whose older PEFT has no such file
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[target])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it wants the other names of the experts as well
        return True
    return bool(config.target_parameters)


def _ends_in(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _leaf_names(model: nn.Module) -> str:
    """List the last parts of the names of all linear modules."""
    leaves = {_leaf(name) for name, m in model.named_modules() if is_linear(m)}
    return ", ".join(sorted(leaves)) or "none"
