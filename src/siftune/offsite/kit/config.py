"""The config.json of a kit: the settings that may leave, and the untrusted settings that may be built.

Allowed are the settings that the config's own class declares, besides `model_type` and `dtype`. So everything that is
not the architecture's stays out: paths and names (`_name_or_path`), versions, labels, quantisation, code (`auto_map`),
added attributes. The values of a setting are limited in ranges.py. The model that an untrusted config describes is
built and run once without memory before a kit counts as sound, so that it does not fail later.
"""

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from siftune.base.errors import KitError
from siftune.models.families import FAMILIES
from siftune.offsite.emulator.model import build, emulator_config, frozen_names, outer_names
from siftune.offsite.kit.manifest import EMULATOR, MANIFEST, Manifest
from siftune.offsite.kit.ranges import LAYER_KINDS, ROTARY, check_range
from siftune.offsite.kit.strict import brief, shown
from siftune.offsite.kit.tensors import DTYPES, TensorSpec

CONFIG = "config.json"
MAX_BUFFERS = 64 << 20  # bytes that a model computes for itself, such as the frequencies of rotary embeddings
MAX_ANGLE = 100  # of cosines and sines with their factor, which is about 1
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def scrub(config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
    """Take from an emulator's config what may leave, for config.json; `dtype` is its weights', in safetensors' words.

    Raises:
        KitError: A setting has a value that no kit may hold, such as a text with slashes.
    """
    names_of_family = _known(config.model_type)
    settings = {name: value for name, value in config.to_dict().items() if name in names_of_family}
    if isinstance(settings.get("rope_parameters"), dict):
        settings["rope_parameters"] = _scrub_rotary(settings["rope_parameters"])
    # (ours) some configs name a token that no embedding is there for, such as -1, and mean none
    strange = [name for name in _TOKENS if any(not 0 <= n < config.vocab_size for n in _numbers(settings.get(name)))]
    settings |= dict.fromkeys(strange)
    settings |= {"model_type": config.model_type, "dtype": _torch_name(dtype)}
    check_settings(settings)
    return settings


def _scrub_rotary(value: Mapping[str, Any]) -> dict[str, Any]:
    nested = {kind: _scrub_rotary(value[kind]) for kind in LAYER_KINDS if isinstance(value.get(kind), dict)}
    return nested | {name: setting for name, setting in value.items() if name in ROTARY and setting is not None}


def _numbers(value: Any) -> list[Any]:
    """None, one or several token numbers as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _known(model_type: str) -> set[str]:
    """Names of the settings that a family's config class declares."""
    general = {field.name for field in fields(PreTrainedConfig)}
    own = {field.name for field in fields(CONFIG_MAPPING[model_type])}
    return (own - general) | {"model_type", "dtype"}


def _torch_name(dtype: str) -> str:
    return str(DTYPES[dtype]).removeprefix("torch.")


def depth_key(model_type: str) -> str:
    """Name of the setting that holds the number of layers."""
    return CONFIG_MAPPING[model_type].attribute_map.get("num_hidden_layers", "num_hidden_layers")  # type: ignore[no-any-return]


def check_settings(value: Any) -> dict[str, Any]:
    """Check a config.json: known names, plain values within bounds. No config is built of it yet.

    Raises:
        KitError: The message names the field.
    """
    if not isinstance(value, dict) or value.get("model_type") not in (*FAMILIES,):
        family = shown(value.get("model_type") if isinstance(value, dict) else value)
        raise KitError(f"{CONFIG}: model_type is {family}; known are {', '.join(FAMILIES)}")
    depth = depth_key(value["model_type"])
    names_of_family = _known(value["model_type"])
    for name, setting in value.items():
        if name not in names_of_family:
            raise KitError(f"{CONFIG} has the key {shown(name)}, which this version of transformers does not know")
        check_range(name, setting, f"{CONFIG}: {name}")
    if depth not in value:
        raise KitError(f"{CONFIG} has no {depth}")
    return value


def make_config(settings: Mapping[str, Any]) -> PreTrainedConfig:
    """Build the config of checked settings.

    Raises:
        KitError: The config's class refuses them, or they do not fit each other. What a config.json leaves out counts
            too, as the class fills it in.
    """
    plain = copy.deepcopy(dict(settings))  # the class fills in rotary settings in place
    kind = plain.pop("model_type")
    try:
        made = AutoConfig.for_model(kind, **plain)
    except Exception as error:  # the class runs on untrusted values
        raise KitError(f"{CONFIG} is no config of type {kind} ({brief(error)})") from error
    _check_together(made)
    return made


def _check_together(config: PreTrainedConfig) -> None:
    """Refuse settings that are fine each for itself, but not side by side."""
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise KitError(f"{CONFIG}: {heads} attention heads do not divide a hidden size of {config.hidden_size}")
    if shared and heads % shared:
        raise KitError(f"{CONFIG}: num_key_value_heads is {shared}, which does not divide {heads} attention heads")
    for name in _TOKENS:
        for token in _numbers(getattr(config, name, None)):
            if token >= config.vocab_size:
                raise KitError(f"{CONFIG}: {name} is {token}, but the last of {config.vocab_size} tokens is one less")
    kinds = getattr(config, "layer_types", None) or ()
    if "sliding_attention" in kinds and getattr(config, "sliding_window", None) is None:
        raise KitError(f"{CONFIG}: layer_types has sliding_attention, but there is no sliding_window")


def expected_specs(
    settings: Mapping[str, Any], manifest: Manifest, dtypes: tuple[str, str]
) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Find out, on the meta device and without memory, which tensors a kit must hold.

    Args:
        settings: Its config.json, checked.
        manifest: Its manifest, checked.
        dtypes: Of the frozen tensors and of the outer layers', in safetensors' words.

    Returns:
        Of the frozen tensors and of the outer layers': name -> spec.

    Raises:
        KitError: Config and manifest do not fit, or no model can be built of them.
    """
    _check_fit(settings, manifest, dtypes[0])
    try:
        model = build(make_config(settings), manifest.split, manifest.middle)
        state: dict[str, Tensor] = model.state_dict()
        frozen = frozen_names(model, manifest.split)
        outer = outer_names(model, manifest.split)
    except KitError:
        raise
    except Exception as error:  # transformers runs on untrusted values
        raise KitError(f"{CONFIG}: no model can be built of it ({brief(error)})") from error
    _check_buffers(model, state)
    try_model(model, CONFIG)
    return (
        {name: TensorSpec(tuple(state[name].shape), dtypes[0]) for name in frozen},
        {name: TensorSpec(tuple(state[inner].shape), dtypes[1]) for name, inner in outer.items()},
    )


def check_of_base(settings: Mapping[str, Any], manifest: Manifest, base: PreTrainedConfig) -> None:
    """Hold what a kit, checked, says of its base to the base: family, depth, and which of its layers the middle has.

    Where all layers are of one kind only the model's owner could tell one number of a layer from another, and nothing
    is built by it.

    Raises:
        KitError: They do not fit.
    """
    said = {"model_type": manifest.model_type, "layers": manifest.depth}
    facts = {"model_type": base.model_type, "layers": base.num_hidden_layers}
    for name, value in said.items():
        if value != facts[name]:
            raise KitError(f"{MANIFEST}: base.{name} is {value}, but the base model's is {facts[name]}")
    expected = emulator_config(base, manifest.split, manifest.middle)
    kinds, own = (getattr(c, "layer_types", None) for c in (make_config(settings), expected))
    if kinds != own:
        raise KitError(f"{CONFIG}: layer_types are not those of the base's layers that {MANIFEST}: middle names")


def _check_fit(settings: Mapping[str, Any], manifest: Manifest, dtype: str) -> None:
    depth = depth_key(settings["model_type"])
    expected = {
        "model_type": (manifest.model_type, "by the manifest"),
        depth: (manifest.emulator_depth, "by split and middle of the manifest"),
        "dtype": (_torch_name(dtype), f"by {EMULATOR}"),
    }
    for name, (value, source) in expected.items():
        if settings.get(name) != value:
            raise KitError(f"{CONFIG}: {name} is {shown(settings.get(name))}, but {value} {source}")


def _check_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Limit what a model would allocate that no file pays for."""
    unpaid = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name not in state)
    if unpaid > MAX_BUFFERS:
        raise KitError(f"{CONFIG}: the model would compute {unpaid} bytes of buffers; {MAX_BUFFERS} are allowed")


_ROW = 2  # in the row that is tried


def try_model(model: PreTrainedModel, name: str) -> None:
    """Run a model from `build` once on the meta device, and its rotary embeddings with numbers; it is spent afterwards.

    Its buffers are limited already; `name` is the file that it is built of, for messages.

    Raises:
        KitError: Shapes do not fit each other, or a position's angles are not finite.
    """
    rotary = [module for module in model.modules() if hasattr(module, "rope_type")]
    try:
        angles = [angle for module in rotary for angle in _angles(module)]
        for module in rotary:
            module.rope_type = _plain(module.rope_type)  # others look at the positions, which have no numbers here
        model.float().train()  # not all of it was built in the same dtype
        ids = torch.zeros(1, _ROW, dtype=torch.long, device="meta")
        with torch.no_grad():
            model(inputs_embeds=model.get_input_embeddings()(ids), labels=ids, use_cache=True)
    except Exception as error:  # transformers runs on untrusted values
        raise KitError(f"{name}: the model of it cannot run ({brief(error)})") from error
    if not all(bool((angle.abs() <= MAX_ANGLE).all()) for angle in angles):
        raise KitError(f"{name}: rope_parameters make cosines that are not finite, or above {MAX_ANGLE}")


def _plain(kind: Any) -> Any:
    return dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"


def _angles(module: nn.Module) -> list[torch.Tensor]:
    """Cosines and sines of the first position and of one past the last, which some kinds treat otherwise."""
    config: Any = module.config
    with torch.device("cpu"):
        real: Any = type(module)(config=config)
        places = torch.tensor([[0, config.max_position_embeddings]])
        kinds = real.rope_type if isinstance(real.rope_type, dict) else (None,)
        wanted = [{} if kind is None else {"layer_type": kind} for kind in kinds]
        return [angle for kind in wanted for angle in real(torch.zeros(1), places, **kind)]
