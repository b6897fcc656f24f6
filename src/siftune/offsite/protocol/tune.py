"""Kits in training: which layers of one train, and what goes back to the owner of the base model."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.config import Recipe
from siftune.errors import RecipeError
from siftune.models.full import layer_numbers
from siftune.models.layers import find_layers
from siftune.offsite.emulator.split import Split, adapter_names, places
from siftune.offsite.kit.folder import Kit, is_kit, read_kit
from siftune.offsite.kit.tensors import DTYPES
from siftune.offsite.protocol.load import load_kit
from siftune.offsite.protocol.returned import read_return, write_return
from siftune.trainer.tuned_layers import put_in


def kit_of(source: str) -> Kit | None:
    """Read the kit that a recipe's `model` names; None for any other model.

    Raises:
        KitError: The kit is damaged.
    """
    path = Path(source).expanduser()
    return read_kit(path) if is_kit(path) else None


def load_tunable(kit: Kit, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a kit's emulator and tokenizer; the model knows where it is from, for the adapter's config.

    Raises:
        KitError: As `load_kit`.
    """
    model, tokenizer = load_kit(kit.path, dtype)
    model.name_or_path = str(kit.path)
    return model, tokenizer


def settle_layers(recipe: Recipe, kit: Kit | None) -> Recipe:
    """Fill in which layers of a kit train, and refuse to train all weights of a model.

    Args:
        recipe: Resolved settings.
        kit: The kit that `recipe.model` names; None for another model.

    Raises:
        RecipeError: All weights would train, or a layer between a kit's adapter layers would.
        LayerError: There is no such layer.
    """
    if kit is None:
        if recipe.adapter == "full" and recipe.layers is None:
            raise RecipeError(
                "adapter is full and no layers are given: training all weights of a model is not what siftune is for; "
                "give --layers, such as 0 1 -2 -1, or an adapter such as lora"
            )
        return recipe
    split, depth = kit.manifest.split, kit.manifest.emulator_depth
    outer = split.outer(depth)
    chosen = layer_numbers(depth, outer if recipe.layers is None else recipe.layers)
    middle = [number for number in chosen if number not in outer]
    if middle:
        raise RecipeError(
            f"layers names {_listed(middle)}, but in the kit {kit.path} only the adapter's layers {_listed(outer)} can "
            f"train: what lies between stays as the model's owner made it; give some of these, or leave layers out"
        )
    return replace(recipe, layers=chosen)


def save_return(folder: Path, model: nn.Module, kit: Kit) -> None:
    """Write what goes back to the owner: the adapter's layers as they are now, in the dtypes of the kit.

    Args:
        folder: Where to; it must not exist.
        model: The kit's emulator, with or without PEFT adapters; left as it is.
        kit: The kit.

    Raises:
        KitError: A value is not finite in the kit's dtype.
    """
    merged = merged_layers(model, kit.manifest.split)
    wanted = kit.manifest.adapter
    write_return(folder, {name: merged[name].to(DTYPES[spec.dtype]) for name, spec in wanted.items()}, kit)


def put_in_return(model: nn.Module, folder: Path, source: str) -> None:
    """Put a return's tensors into the emulator that it was trained on, in place.

    Args:
        model: The emulator, without PEFT around it.
        folder: The return.
        source: Folder of the kit.

    Raises:
        KitError: The return is damaged, or of another kit.
    """
    kit = read_kit(Path(source).expanduser())
    names = adapter_names(model, kit.manifest.split)
    put_in(model, {names[name]: tensor for name, tensor in read_return(folder, kit).items()}, folder)


def merged_layers(model: nn.Module, split: Split) -> dict[str, Tensor]:
    """The tensors of the adapter's layers, PEFT adapters in them merged.

    Args:
        model: A base model or an emulator, with or without PEFT adapters; left as it is.
        split: Its split.

    Returns:
        By the names of `split.adapter_names`, on the CPU; floating-point ones in float32, or float64 where they are.
    """
    layers = find_layers(model).layers
    tensors = {}
    for place, number in places(split, len(layers)):
        for name, tensor in _merged(layers[number]).items():
            tensors[f"{place}.{name}"] = tensor.detach().cpu()
    return tensors


def _merged(layer: nn.Module) -> dict[str, Tensor]:
    """State of a copy of a layer, merged: merging into half precision and taking out again would leave its rounding."""
    layer = copy.deepcopy(layer)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.float()
    tuners = {name: module for name, module in layer.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, module in tuners.items():
        module.merge()
        layer.set_submodule(name, module.get_base_layer())
    return layer.state_dict()


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
