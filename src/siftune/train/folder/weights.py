"""Trained weights in a folder: an adapter in PEFT's format, or decoder layers.

FOLDER/                      of an adapter: adapter_config.json, adapter_model.safetensors
  tuned_layers.safetensors   weights of decoder layers, by name in the model's state dict
  tuned_layers.json          {"base": source of the base model, "layers": numbers of the layers}
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from siftune.base.errors import AdapterError, RecipeError
from siftune.base.json_files import read_json
from siftune.models.adapters.registry import ADAPTER_TYPES, adapter_type_of
from siftune.models.adapters.saved import CONFIG, read_config
from siftune.recipe.schema import Recipe

_WEIGHTS = "tuned_layers.safetensors"
_ABOUT = "tuned_layers.json"


def adapter_folder(name: str) -> Path:
    """Adapter folder of a run folder, or of itself.

    Raises:
        AdapterError: There is none.
    """
    path = Path(name).expanduser()
    for folder in (path / "adapter", path):
        if (folder / CONFIG).is_file():
            return folder
        if holds_tuned(folder):
            raise AdapterError(f"{folder} holds tuned layers, no adapter: export it to a model first")
    raise AdapterError(f"from_adapter is {name}, but there is no adapter_config.json in it or in its folder adapter")


def adopted(recipe: Recipe) -> Recipe:
    """Fill in type, rank, alpha and dropout of the adapter that a recipe's `from_adapter` names.

    Raises:
        AdapterError: The adapter is of an unknown type, or cannot be read.
        RecipeError: The recipe asks for something else.
    """
    if recipe.from_adapter is None:
        return recipe
    folder = adapter_folder(recipe.from_adapter)
    config = read_config(folder)
    adapter_type = str(adapter_type_of(config))
    keys = {name: key for name, key in ADAPTER_TYPES[adapter_type].keys.items() if name != "dropout" or key in config}
    if missing := [key for key in keys.values() if config.get(key) is None]:
        raise AdapterError(f"{folder / CONFIG} has no {missing[0]}; save the adapter again")
    own = {name: _whole(config[key]) for name, key in keys.items()} | {"adapter": adapter_type}
    for name, value in own.items():
        asked = getattr(recipe, name)
        if asked not in (getattr(Recipe, name), value):
            raise RecipeError(f"{name} is {asked}, but the adapter in {folder} has {value}: leave {name} out")
    return replace(recipe, **own)


def _whole(value: Any) -> Any:
    """A number without its fraction if it has none: other tools write an alpha of 16.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def write_adapter(model: PeftModel, folder: Path, **options: Any) -> None:
    """Write an adapter in PEFT's format, without PEFT's model card; one that is there is removed.

    Args:
        model: The tuned model.
        folder: Folder to write to.
        options: Further arguments of PEFT's `save_pretrained`.
    """
    # embeddings are the base's: PEFT need not read the base's config again, or ask the hub, to decide that
    model.save_pretrained(folder, save_embedding_layers=False, **options)
    (folder / "README.md").unlink(missing_ok=True)


@dataclass(frozen=True)
class About:
    """Origin of tuned layers."""

    base: str  # source of the base model, for `load_model`
    layers: tuple[int, ...]  # numbers of the layers, from 0, ascending


def save_tuned(folder: Path, about: About, tensors: Mapping[str, Tensor]) -> None:
    """Write weights, by name in the model's state dict, and their origin."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _ABOUT).write_text(json.dumps(asdict(about), indent=2) + "\n", encoding="utf-8")


def holds_tuned(folder: Path) -> bool:
    """Whether a folder holds tuned layers."""
    return (folder / _ABOUT).is_file()


def read_about(folder: Path) -> About:
    """Read the origin of tuned layers.

    Raises:
        InputError: The file is damaged.
    """
    return read_json(folder / _ABOUT, About, "train again")


def read_tuned(folder: Path) -> dict[str, Tensor]:
    """Read the weights of tuned layers, by name in the model's state dict.

    Raises:
        AdapterError: The file is missing or damaged, or a value is not finite.
    """
    path = folder / _WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read ({error}); train again") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{path}: {name} holds NaN or infinity; train again with a lower --lr")
    return tensors


def put_in(model: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy tensors, by name, into a model's own, whose dtype and device stay.

    Raises:
        AdapterError: The model has no such tensor, or one of another shape; then nothing is changed.
    """
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            there = f"shape {tuple(own[name].shape)}" if name in own else "nothing"
            raise AdapterError(
                f"the layers in {source} do not fit the model: {name} has shape {tuple(tensor.shape)}, the model has "
                f"{there} there; give the model that they were trained on"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
