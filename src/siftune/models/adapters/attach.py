"""Attach adapters: to every linear map of the decoder layers that sees every token, or to those that are named."""

import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D

from siftune.base.errors import AdapterError
from siftune.base.files import why_unreadable
from siftune.models.adapters.registry import CARRIERS, Shape, filled_in
from siftune.models.adapters.rounded import refuse_rounded
from siftune.models.layers import find_layers, inside, layer_numbers

_MAMBA_PARTS = {"x_proj", "dt_proj", "out_proj"}


def layer_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Collect the linear modules of the decoder layers that an adapter can go on, by full name.

    Left out are experts and routers; modules whose names PEFT takes for those of the experts; and, of Mamba's mixers,
    all but the input projection: their weights are read past any adapter, by fused kernels or by the model itself.

    Raises:
        LayerError: The layers cannot be found.
        AdapterError: They have no linear module.
    """
    found = find_layers(model)
    names = {module: name for name, module in model.named_modules()}
    linears = {names[m]: m for layer in found.layers for m in layer.modules() if is_linear(m)}
    parts = {name for layer in found.layers for name in (*_expert_parts(layer, names), *_mamba_parts(layer, names))}
    chosen = {n: m for n, m in linears.items() if not any(_is_within(n, part) for part in parts)}
    if any(expert_banks(layer) for layer in found.layers):
        taken = {leaf for leaf in map(_leaf, chosen) if _means_experts(model, leaf)}
        chosen = {n: m for n, m in chosen.items() if _leaf(n) not in taken}
    if not chosen:
        raise AdapterError(
            f"the layers at {found.path} have no linear module to adapt; name modules with `targets`, "
            f"out of: {_leaf_names(model)}"
        )
    return chosen


def named_modules(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """Collect the linear modules and embeddings whose names are, or end in, one of `targets`.

    Raises:
        AdapterError: A target matches nothing.
    """
    modules = {n: m for n, m in model.named_modules() if is_linear(m) or isinstance(m, nn.Embedding)}
    found = {target: {n: m for n, m in modules.items() if _ends_in(n, target)} for target in targets}
    missing = [target for target, matches in found.items() if not matches]
    if missing or not found:
        raise AdapterError(
            f"no linear module of {type(model).__name__} is called {' or '.join(missing) or '(targets is empty)'}; "
            f"available: {_leaf_names(model)}"
        )
    return {n: m for matches in found.values() for n, m in matches.items()}


def transposed(linears: Mapping[str, nn.Module]) -> bool:
    """Whether linear modules hold their weights as (in, out), as GPT-2's do."""
    return any(isinstance(module, Conv1D) for module in linears.values())


def chosen_linears(model: nn.Module, shape: Shape) -> dict[str, nn.Module]:
    """Collect the linear modules that a shape names: of the decoder layers where it names none, and in its layers.

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


def _expert_parts(layer: nn.Module, names: dict[nn.Module, str]) -> Iterator[str]:
    """Name the experts and routers in a layer.

    Experts are a ModuleList, or one module with weights of (experts, out, in). Routers are the linear modules
    beside them with one output per expert, or with a single one (gates of shared experts).
    """
    for block in layer.modules():
        for count, bank in ((_expert_count(child), child) for child in block.children()):
            if count:
                yield names[bank]
                linears = (m for m in block.modules() if is_linear(m))
                yield from (names[m] for m in linears if getattr(m, "out_features", None) in (1, count))


def _mamba_parts(layer: nn.Module, names: dict[nn.Module, str]) -> Iterator[str]:
    """Name the linear modules of Mamba's mixers whose weights are used without calling them."""
    for mixer in layer.modules():
        if is_mamba(mixer):
            yield from (names[part] for name, part in mixer.named_children() if name in _MAMBA_PARTS)


def is_mamba(module: nn.Module) -> bool:
    """Whether a module is a mixer of Mamba."""
    return {"A_log", "D"} <= module._parameters.keys()


def _means_experts(model: nn.Module, target: str) -> bool:
    """Whether PEFT puts an adapter on experts where this name is targeted.

    For some mixtures it takes `gate_proj` for a part of the experts, as the name was before transformers fused them,
    though a dense layer or a shared expert has a module of that name.
    """
    # only where adapters are made: methods also run inside tools whose PEFT is older and has no such file
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[target])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it wants the other names of the experts as well
        return True
    return bool(config.target_parameters)


def _expert_count(module: nn.Module) -> int:
    """Return how many experts a module holds; 0 for anything but a bank of experts."""
    if isinstance(module, nn.ModuleList):
        return len(module)
    others = nn.modules.conv._ConvNd | nn.ParameterDict | nn.ParameterList  # the last two: parts of adapters
    if isinstance(module, others) or is_mamba(module):  # three dimensions as well
        return 0
    return next((p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1), 0)


def expert_banks(layer: nn.Module) -> list[nn.Module]:
    """Return the modules in a layer that hold its experts."""
    return [child for block in layer.modules() for child in block.children() if _expert_count(child)]


EXPERTS = "experts"  # among targets: the experts of a mixture


def expert_weights(model: nn.Module, layers: Sequence[int] | None) -> list[str]:
    """Name the weights of (experts, out, in) of all experts, in some layers or in all.

    Raises:
        AdapterError: There is none.
    """
    found = find_layers(model)
    names = {module: name for name, module in model.named_modules()}
    chosen = range(len(found.layers)) if layers is None else layer_numbers(len(found.layers), layers)
    banks = [bank for number in chosen for bank in expert_banks(found.layers[number])]
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


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map: torch's, GPT-2's transposed one, or a quantised one."""
    quantised = hasattr(module, "in_features") and hasattr(module, "out_features") and not module._modules
    return isinstance(module, nn.Linear | Conv1D) or quantised


def _is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def _ends_in(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _leaf_names(model: nn.Module) -> str:
    """List the last parts of the names of all linear modules."""
    leaves = {_leaf(name) for name, m in model.named_modules() if is_linear(m)}
    return ", ".join(sorted(leaves)) or "none"


def attach_adapter(
    model: nn.Module,
    kind: str = "lora",
    rank: int | None = None,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    init: str = "default",
) -> PeftModel:
    """Attach an adapter to a causal language model, in place.

    Adapter weights are float32 whatever the dtype of the base; see `use_base_dtype` to compute in the base's.

    Args:
        model: A transformers model without adapters.
        kind: One of `carriers.CARRIERS`, such as "lora", "dora", "series" or "parallel".
        rank: Rank of the matrices A (rank, in) and B (out, rank), or width of a bottleneck. None
            stands for the kind's: 32 for LoRA, 256 for bottlenecks.
        alpha: Numerator of the response's scale, alpha/rank (alpha/√rank for rsLoRA). None stands for 2·rank, a scale
            of 2 (LoRA and DoRA), for 16 whatever the rank (rsLoRA, whose point is that the scale falls with √rank
            only), for rank (series) and for 4·rank (parallel).
        dropout: Probability of zeroing an input of A, in [0, 1).
        targets: Names, or ends of dotted names, of the modules to adapt; of bottlenecks "attention" and "mlp". None
            stands for every linear module of the decoder layers, attention and MLP, but for what `layer_linears`
            leaves out: experts and routers of a mixture, modules that PEFT takes for experts, most of Mamba's mixers.
        layers: Numbers of the decoder layers that get adapters, from 0, negative ones from the end. None stands for
            all of them.
        init: First values: "default", PEFT's own, or what its `init_lora_weights` takes besides, such as "pissa".

    Raises:
        AdapterError: A setting is out of range or not for this kind, the model has adapters already, or a target names
            no module.
        LayerError: There is no such layer; or the decoder layers cannot be found, and `targets` is None or `layers`
            is not.

    Example:
        >>> tuned = attach_adapter(base, rank=8, targets=["q_proj", "v_proj"])
        >>> sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        3584
    """
    shape = filled_in(kind, Shape(rank, alpha, dropout, init, targets, layers))
    if (shape.rank is not None and shape.rank < 1) or not 0 <= dropout < 1:
        raise AdapterError(f"rank must be ≥ 1 and dropout in [0, 1); found rank={shape.rank}, dropout={dropout}")
    refuse_adapters(model)
    refuse_rounded(model, kind)
    return _put_on(model, kind, CARRIERS[kind].make(model, shape))


def _put_on(model: nn.Module, kind: str, config: PeftConfig) -> PeftModel:
    """Have PEFT do it, and say in one sentence where it cannot."""
    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(
            f"PEFT cannot put an adapter {kind} on {type(model).__name__}: {reason.rstrip('.')}; give other targets or "
            "another rank, or take another kind, such as lora"
        ) from error


_UNREADABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError, UserWarning,
    EOFError, pickle.UnpicklingError,  # of a damaged adapter_model.bin
)  # fmt: skip


def load_adapter(model: nn.Module, adapter: Path, base: str, exact: bool = False, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on its base model, in place.

    Args:
        model: The base model, without adapters.
        adapter: Folder of the adapter, in PEFT's format.
        base: What messages call the model.
        exact: Keep the adapter in float32 whatever the base's dtype; slower on many machines.
        trainable: To go on training it, rather than to use it.

    Raises:
        AdapterError: It can't be read or doesn't fit the model.
    """
    from siftune.models.adapters.own import register  # kinds that PEFT does not know by itself

    register()
    if not any((adapter / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise AdapterError(f"{adapter} has no weights (adapter_model.safetensors); save the adapter again.")
    try:
        with warnings.catch_warnings():
            # PEFT goes on with random or zero weights where some are missing, and only warns
            warnings.filterwarnings("error", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", category=FutureWarning)  # between PEFT and transformers
            # in the base's dtype, as in training: float32 products are slow on many machines
            return PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=exact, is_trainable=trainable)
    except _UNREADABLE as error:
        raise AdapterError(
            f"the adapter in {adapter} doesn't fit the model {base}: {why_unreadable(error)}; give the adapter's own "
            "base model."
        ) from error


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model that has PEFT adapters.

    Raises:
        AdapterError: It has.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterError(
            f"{type(model).__name__} has adapters already; merge them or take them off "
            "(PEFT: merge_and_unload(), unload()), or go on with the ones that it has"
        )
