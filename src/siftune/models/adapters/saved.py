"""Configs of saved adapters, checked before PEFT reads them."""

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from siftune.base.errors import AdapterError, InputError
from siftune.base.json_files import read_json
from siftune.base.text import one_line
from siftune.models.adapters.registry import ADAPTER_TYPES

CONFIG = "adapter_config.json"
_PEFT_TYPES = tuple(dict.fromkeys(str(each.marks["peft_type"]) for each in ADAPTER_TYPES.values()))


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
    feedforward_modules: _Names = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Number] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    parallel: bool = False
    layer_replication: Annotated[Any, AfterValidator(_no_replication)] = None


def read_config(adapter: Path) -> dict[str, Any]:
    """Read the config of a saved adapter.

    Args:
        adapter: Folder of the adapter, in PEFT's format.

    Returns:
        The fields that the file has.

    Raises:
        AdapterError: The file cannot be read, a field has another form, or the adapter is of an unsupported type.
    """
    try:
        config = read_json(adapter / CONFIG, _Config, "save the adapter again, or use another")
    except InputError as error:
        raise AdapterError(str(error)) from error
    return config.model_dump(exclude_unset=True)
