"""Weights of decoder layers that were trained themselves, in a folder.

FOLDER/
  tuned_layers.safetensors   the layers' weights, by name in the model's state dict
  tuned_layers.json          {"base": source of the base model, "layers": numbers of the layers}
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from siftune.base.errors import AdapterError
from siftune.base.jsonable import parsed

_WEIGHTS = "tuned_layers.safetensors"
_ABOUT = "tuned_layers.json"


@dataclass(frozen=True)
class About:
    """What the weights in a folder belong to."""

    base: str  # source of the base model, for `load_model`
    layers: tuple[int, ...]  # numbers of the layers, from 0, ascending
    outside: tuple[str, ...] = ()  # what else was trained: "embeddings", "head"


def save_tuned(folder: Path, about: About, tensors: Mapping[str, Tensor]) -> None:
    """Write weights, by name in the model's state dict, and what they belong to; `folder` is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / _WEIGHTS, metadata={"format": "pt"})
    text = json.dumps({**asdict(about), "layers": list(about.layers), "outside": list(about.outside)}, indent=2) + "\n"
    (folder / _ABOUT).write_text(text, encoding="utf-8")


def holds_tuned(folder: Path) -> bool:
    """Whether a folder holds tuned layers."""
    return (folder / _ABOUT).is_file()


def read_about(folder: Path) -> About:
    """Read what the weights in a folder belong to.

    Raises:
        AdapterError: The file is damaged.
    """
    path = folder / _ABOUT
    try:
        content = parsed(path.read_text(encoding="utf-8"))
        base, layers, outside = content["base"], content["layers"], content.get("outside", [])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} can't be read ({error}); train again.") from error
    if not isinstance(base, str) or not isinstance(layers, list) or not all(type(n) is int for n in layers):
        raise AdapterError(f"{path} must hold `base`, a text, and `layers`, a list of whole numbers; train again.")
    if not isinstance(outside, list) or not all(isinstance(name, str) for name in outside):
        raise AdapterError(f"{path}: `outside` must be a list of names; train again.")
    return About(base, tuple(layers), tuple(outside))


def read_tuned(folder: Path) -> dict[str, Tensor]:
    """Read weights, by name in the model's state dict.

    Raises:
        AdapterError: The file is missing or damaged, or a value is not finite.
    """
    path = folder / _WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} can't be read ({error}); train again.") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{path}: {name} holds NaN or infinity; train again with a lower --lr.")
    return tensors


def put_in(model: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Put tensors, by name, in the place of a model's own, in the dtype and on the device of these.

    Raises:
        AdapterError: The model has no such tensor, or one of another shape; then nothing is changed.
    """
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            found = f"shape {tuple(own[name].shape)}" if name in own else "nothing"
            raise AdapterError(
                f"the layers in {source} don't fit the model: {name} has shape {tuple(tensor.shape)}, the model has "
                f"{found} there; give the model that they were trained on."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
