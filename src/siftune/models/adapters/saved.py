"""Configs of saved adapters, checked before PEFT reads them, since another party may have made them.

PEFT matches the patterns of a config with the names of a model's modules. Some patterns take longer than the age of
the universe for a name of thirty letters, and Python's matching has no time limit. So a process of its own tries them
first *(ours)*.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from siftune.base.errors import AdapterError, InputError
from siftune.base.json_files import read_json
from siftune.base.links import check_links
from siftune.base.text import one_line
from siftune.models.adapters.registry import ADAPTER_TYPES

CONFIG = "adapter_config.json"
_LARGEST = 2**22  # bytes
_SECONDS = 10.0  # for all patterns and names
_ITERATIONS = 64  # of an approximate singular value decomposition; PEFT's documentation uses 16
_PEFT_TYPES = tuple(dict.fromkeys(str(each.marks["peft_type"]) for each in ADAPTER_TYPES.values()))
_PLAIN = re.compile(r"[\w.-]*")  # a name of modules: it matches in no time
_MANY = 200  # plain names; each is compiled for each module once they exceed the cache of `re`
_TRIAL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    try:
        re.compile(pattern)
    except Exception:
        print(number)
        sys.exit(1)
for name in names:
    for pattern in patterns:
        re.fullmatch(pattern, name)
"""


def _known_type(name: str) -> str:
    if name not in _PEFT_TYPES:
        raise _fault(f"{one_line(name)} is not supported; supported types: {', '.join(_PEFT_TYPES)}")
    return name


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise _fault("must be a finite number")
    return value


def _no_replication(value: Any) -> Any:
    if value:
        raise _fault("layers that share their weights are not supported")
    return value


def _quick_start(value: bool | str | None) -> bool | str | None:
    """An initialisation that PEFT carries out again when it loads an adapter."""
    times = value.removeprefix("pissa_niter_") if isinstance(value, str) else ""
    if times.isdecimal() and (len(times) > 4 or int(times) > _ITERATIONS):
        raise _fault(f"at most {_ITERATIONS} iterations are supported")
    if value == "loftq":
        raise _fault("loftq is not supported; save the adapter with init_lora_weights true")
    return value


def _fault(sentence: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported", "{sentence}", {"sentence": sentence})


_Names = str | list[str] | None
_Number = Annotated[int | float, AfterValidator(_finite)]
_Rank = Annotated[int, Field(ge=1, le=2**16)]


class _Config(BaseModel):
    """The fields of an adapter_config.json that siftune or PEFT read before the weights; others are left to PEFT."""

    model_config = ConfigDict(extra="allow")
    peft_type: Annotated[str, AfterValidator(_known_type)]
    base_model_name_or_path: str | None = None
    r: _Rank | None = None
    lora_alpha: _Number | None = None
    lora_dropout: _Number | None = None
    alpha: _Number | None = None
    dropout: _Number | None = None
    target_modules: _Names = None
    exclude_modules: _Names = None
    feedforward_modules: _Names = None
    layers_pattern: _Names = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Number] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    parallel: bool = False
    layer_replication: Annotated[Any, AfterValidator(_no_replication)] = None
    init_lora_weights: Annotated[bool | str | None, AfterValidator(_quick_start)] = True


def read_config(adapter: Path) -> dict[str, Any]:
    """Read the config of a saved adapter.

    Args:
        adapter: Folder of the adapter, in PEFT's format.

    Returns:
        The fields that the file has.

    Raises:
        AdapterError: The file cannot be read, a field has another form, or the adapter is of an unsupported type.
        InputError: The folder holds a link to a file elsewhere, or a pipe.
    """
    check_links(adapter)
    try:
        config = read_json(adapter / CONFIG, _Config, "save the adapter again, or use another", _LARGEST)
    except InputError as error:
        raise AdapterError(str(error)) from error
    return config.model_dump(exclude_unset=True)


def check_patterns(adapter: Path, config: dict[str, Any], names: Sequence[str]) -> None:
    """Try the patterns of a config on the names of a model's modules.

    Args:
        adapter: Folder of the adapter, for the message.
        config: Its config, by `read_config`.
        names: Dotted names of the modules.

    Raises:
        AdapterError: A pattern is invalid, or all together take more than 10 seconds.
    """
    patterns = _patterns(config)
    if all(_PLAIN.fullmatch(pattern) for pattern, _ in patterns) and len(patterns) <= _MANY:
        return
    command = [sys.executable, "-I", "-c", _TRIAL]
    content = json.dumps([[form.format(pattern) for pattern, form in patterns], list(names)]).encode()
    try:
        trial = subprocess.run(command, input=content, capture_output=True, timeout=_SECONDS)
        if trial.returncode == 0:
            return
        wrong = "patterns that cannot be matched"
        if number := trial.stdout.strip():
            wrong = f"the pattern {patterns[int(number)][0]!r}, which is invalid"
    except subprocess.TimeoutExpired:
        wrong = f"patterns that take more than {_SECONDS:g} s to match with the names of the modules"
    raise AdapterError(
        f"{adapter / CONFIG} has {one_line(wrong)}: list the modules by their names, or use another adapter"
    )


def _patterns(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Patterns of a config, and the expressions in which PEFT uses them."""
    patterns = []
    for field in ("target_modules", "exclude_modules", "feedforward_modules"):
        patterns += [(config[field], "{}")] if isinstance(config.get(field), str) else []
    layers = config.get("layers_pattern") or []
    for pattern in [layers] if isinstance(layers, str) else layers:
        patterns += [(pattern, r"(?:^|.*?\.){}\.(?P<idx>\d+)\..*")]
    patterns += [(pattern, r"(^|.*\.){}($|\..*)") for pattern in config.get("modules_to_save") or ()]
    for field in ("rank_pattern", "alpha_pattern"):
        patterns += [(pattern, r"(.*\.)?({})$") for pattern in config.get(field) or ()]
    return patterns
