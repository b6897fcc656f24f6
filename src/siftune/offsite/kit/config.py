"""The config.json of a kit: what of a config may leave, and what of a stranger's config may be built.

Allowed are the settings that the config's own class declares, besides `model_type` and `dtype`. So everything that
is not the architecture's stays out: paths and names (`_name_or_path`), versions, labels, quantisation, code
(`auto_map`), attributes that somebody has added. Values are numbers, truth values, words without spaces or slashes,
and lists of them; the rotary settings are an object of known keys.
"""

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from siftune.errors import KitError
from siftune.models.families import FAMILIES
from siftune.offsite.emulator.model import build, frozen_names
from siftune.offsite.emulator.split import outer_names
from siftune.offsite.kit.manifest import EMULATOR, MAX_LAYERS, Manifest
from siftune.offsite.kit.strict import as_int, as_list, as_object, as_text, brief, shown
from siftune.offsite.kit.tensors import DTYPES, MAX_SIZE, TensorSpec

CONFIG = "config.json"
MAX_ITEMS = 1024  # in a list
MAX_BUFFERS = 64 << 20  # bytes that a model computes for itself, such as the frequencies of rotary embeddings
WORD = r"[A-Za-z0-9_.+-]{1,64}"

_ROTARY = (
    *("rope_theta", "rope_type", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
    *("attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor", "low_freq_factor"),
    *("high_freq_factor", "mscale", "mscale_all_dim", "truncate"),
)
_LAYER_KINDS = ("full_attention", "sliding_attention")  # families with two kinds have two sets of rotary settings


def scrub(config: PreTrainedConfig, dtype: str) -> dict[str, Any]:
    """Take from a config what may leave.

    Args:
        config: An emulator's config.
        dtype: Number format of its weights, in safetensors' words.

    Returns:
        The settings for config.json.

    Raises:
        KitError: A setting has a value that no kit may hold, such as a text with slashes.
    """
    known = _known(config.model_type)
    settings = {name: value for name, value in config.to_dict().items() if name in known}
    if isinstance(settings.get("rope_parameters"), dict):
        settings["rope_parameters"] = _scrub_rotary(settings["rope_parameters"])
    settings |= {"model_type": config.model_type, "dtype": _torch_name(dtype)}
    check_settings(settings)
    return settings


def _scrub_rotary(value: Mapping[str, Any]) -> dict[str, Any]:
    nested = {kind: _scrub_rotary(value[kind]) for kind in _LAYER_KINDS if isinstance(value.get(kind), dict)}
    return nested | {name: setting for name, setting in value.items() if name in _ROTARY and setting is not None}


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
        given = shown(value.get("model_type") if isinstance(value, dict) else value)
        raise KitError(f"{CONFIG}: model_type is {given}; known are {', '.join(FAMILIES)}")
    depth = depth_key(value["model_type"])
    known = _known(value["model_type"])
    for name, setting in value.items():
        if name not in known:
            raise KitError(f"{CONFIG} has the key {shown(name)}, which this version of transformers does not know")
        if name == "rope_parameters":
            _check_rotary(setting, f"{CONFIG}: {name}")
        else:
            _check_value(setting, f"{CONFIG}: {name}")
    if depth not in value:
        raise KitError(f"{CONFIG} has no {depth}")
    as_int(value[depth], f"{CONFIG}: {depth}", 2, MAX_LAYERS)
    return value


def _check_rotary(value: Any, where: str) -> None:
    if value is None:
        return
    as_object(value, where, (), (*_ROTARY, *_LAYER_KINDS))
    for name, setting in value.items():
        if name in _LAYER_KINDS:
            as_object(setting, f"{where}.{name}", (), _ROTARY)
            for inner, inner_setting in setting.items():
                _check_value(inner_setting, f"{where}.{name}.{inner}")
        else:
            _check_value(setting, f"{where}.{name}")


def _check_value(value: Any, where: str) -> None:
    if isinstance(value, list):
        for item in as_list(value, where, MAX_ITEMS):
            _check_scalar(item, where)
    else:
        _check_scalar(value, where)


def _check_scalar(value: Any, where: str) -> None:
    if isinstance(value, str):
        as_text(value, where, WORD)
    elif isinstance(value, int):  # truth values pass
        as_int(int(value), where, -MAX_SIZE, MAX_SIZE)
    elif isinstance(value, float):
        if not abs(value) <= 1e15:
            raise KitError(f"{where} is {value}, out of bounds")
    elif value is not None:
        raise KitError(f"{where} is {shown(value)}; a word, a number, true, false or null belongs there")


def make_config(settings: Mapping[str, Any]) -> PreTrainedConfig:
    """Build the config of checked settings.

    Raises:
        KitError: The config's class refuses them.
    """
    plain = copy.deepcopy(dict(settings))  # the class fills in rotary settings in place
    kind = plain.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **plain)
    except Exception as error:  # the class runs on a stranger's values
        raise KitError(f"{CONFIG} is no config of type {kind} ({brief(error)})") from error


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
        frozen = frozen_names(model, manifest.split, manifest.middle)
        outer = outer_names(model, manifest.split)
    except KitError:
        raise
    except Exception as error:  # transformers runs on a stranger's values
        raise KitError(f"{CONFIG}: no model can be built of it ({brief(error)})") from error
    _check_buffers(model, state)
    return (
        {name: TensorSpec(tuple(state[name].shape), dtypes[0]) for name in frozen},
        {name: TensorSpec(tuple(state[inner].shape), dtypes[1]) for name, inner in outer.items()},
    )


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
