"""The config.json of a kit: the settings that may leave, and the untrusted settings that may be built.

Allowed are the settings that the config's own class declares, besides `model_type` and `dtype`. So everything that is
not the architecture's stays out: paths and names (`_name_or_path`), versions, labels, quantisation, code (`auto_map`),
added attributes. A text in a setting is a word, so that no path can stand in it. The model that an untrusted config
describes is built without memory, and its tensors are compared with the kit's.
"""

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from siftune.base.errors import KitError
from siftune.models.families import FAMILIES
from siftune.offsite.emulator.model import build, emulator_config, frozen_names, outer_names
from siftune.offsite.kit.manifest import MANIFEST, MAX_LAYERS, Manifest
from siftune.offsite.kit.strict import as_int, as_text, brief, shown
from siftune.offsite.kit.tensors import DTYPES, TensorSpec

CONFIG = "config.json"
MAX_BUFFERS = 64 << 20  # bytes that a model computes for itself, such as the frequencies of rotary embeddings
WORD = r"[A-Za-z0-9_.+-]{1,64}"
LAYER_KINDS = ("full_attention", "sliding_attention")  # families with two kinds have two sets of rotary settings
ROTARY = (
    *("rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor", "low_freq_factor"),
    *("high_freq_factor", "mscale", "mscale_all_dim", "truncate"),
)
_DTYPE_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}  # torch's -> safetensors'
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
    settings |= {"model_type": config.model_type, "dtype": str(DTYPES[dtype]).removeprefix("torch.")}
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


def depth_key(model_type: str) -> str:
    """Name of the setting that holds the number of layers."""
    return CONFIG_MAPPING[model_type].attribute_map.get("num_hidden_layers", "num_hidden_layers")  # type: ignore[no-any-return]


def check_settings(value: Any) -> dict[str, Any]:
    """Check a config.json: known names, words, number of layers. No config is built of it yet.

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
        _check_words(setting, f"{CONFIG}: {name}")
    if depth not in value:
        raise KitError(f"{CONFIG} has no {depth}")
    as_int(value[depth], f"{CONFIG}: {depth}", 2, MAX_LAYERS)
    if value.get("dtype") not in (*_DTYPE_NAMES,):
        raise KitError(f"{CONFIG}: dtype is {shown(value.get('dtype'))}; known are {', '.join(_DTYPE_NAMES)}")
    return value


def _check_words(value: Any, where: str) -> None:
    """Refuse a text that is no word, also in lists and objects."""
    if isinstance(value, str):
        as_text(value, where, WORD)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in items:
        _check_words(item, where)


def make_config(settings: Mapping[str, Any]) -> PreTrainedConfig:
    """Build the config of checked settings.

    Raises:
        KitError: The config's class refuses them.
    """
    plain = copy.deepcopy(dict(settings))  # the class fills in rotary settings in place
    kind = plain.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **plain)
    except Exception as error:  # the class runs on untrusted values
        raise KitError(f"{CONFIG} is no config of type {kind} ({brief(error)})") from error


def expected_specs(
    settings: Mapping[str, Any], manifest: Manifest
) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Find out, on the meta device and without memory, which tensors a kit must hold.

    Args:
        settings: Its config.json, checked, with the dtype of the frozen tensors.
        manifest: Its manifest, checked, with the dtype of the outer layers'.

    Returns:
        Of the frozen tensors and of the outer layers': name -> spec.

    Raises:
        KitError: Config and manifest do not fit, or no model can be built of them.
    """
    _check_fit(settings, manifest)
    dtype = _DTYPE_NAMES[settings["dtype"]]
    outer_dtype = next(iter(manifest.outer.values())).dtype
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
    return (
        {name: TensorSpec(tuple(state[name].shape), dtype) for name in frozen},
        {name: TensorSpec(tuple(state[inner].shape), outer_dtype) for name, inner in outer.items()},
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


def _check_fit(settings: Mapping[str, Any], manifest: Manifest) -> None:
    depth = depth_key(settings["model_type"])
    expected = {
        "model_type": (manifest.model_type, "by the manifest"),
        depth: (manifest.emulator_depth, "by split and middle of the manifest"),
    }
    for name, (value, source) in expected.items():
        if settings.get(name) != value:
            raise KitError(f"{CONFIG}: {name} is {shown(settings.get(name))}, but {value} {source}")


def _check_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Limit what a model would allocate that no file pays for."""
    unpaid = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name not in state)
    if unpaid > MAX_BUFFERS:
        raise KitError(f"{CONFIG}: the model would compute {unpaid} bytes of buffers; {MAX_BUFFERS} are allowed")
