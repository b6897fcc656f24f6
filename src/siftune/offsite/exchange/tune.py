"""Kits in training: which layers of one train, and what goes back to the owner of the base model."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from siftune.base.errors import RecipeError
from siftune.base.numerics import in_float64
from siftune.models.adapters.registry import ADAPTER_TYPES
from siftune.models.layers import find_layers, layer_numbers
from siftune.offsite.emulator.model import Split, places
from siftune.offsite.exchange.load import kit_tokenizer, load_kit
from siftune.offsite.exchange.returned import DOWN, UP, largest_rank, write_return
from siftune.offsite.kit.folder import Kit, load_weights
from siftune.offsite.kit.manifest import OUTER
from siftune.offsite.kit.tensors import DTYPES, check_finite
from siftune.offsite.maths.drd import canonical
from siftune.recipe.schema import Recipe

_USE_RETURN = """\
The model above is a kit: it stands in for a model that its owner keeps. Send the folder RUN/return, and nothing else,
to the owner, who makes the tuned model of it:

```sh
siftune plug --model BASE --kit KIT --return RUN/return --out TUNED
```

`siftune eval RUN --data FILE` measures the kit's emulator before and after, and `siftune ask RUN PROMPT` shows its
answers.
"""

# of a LoRA's config: the values with which it does not change the base's weights, and merges into any
_FITTING: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "lora_bias": (False,),
    "alora_invocation_tokens": (None,),
}


@dataclass(frozen=True)
class KitSource:
    """A kit as what is tuned: its outer layers, or adapters in them."""

    kit: Kit  # read and checked

    @property
    def usage(self) -> str:
        """Words for the model card: the return goes to the owner."""
        return _USE_RETURN

    @property
    def identity(self) -> Mapping[str, str]:
        """Hash of the manifest, and so of every file."""
        return {"kit": self.kit.digest}

    def settle(self, recipe: Recipe) -> Recipe:
        """Fill in which layers train: the outer ones, or those of them that the recipe names.

        The layers of an adapter that was trained before are its own; see `check_tuned`.

        Raises:
            RecipeError: The recipe would change the kit's weights, or names a layer between the outer ones.
            LayerError: There is no such layer.
        """
        self._refuse_changed(recipe)
        if recipe.from_adapter is not None:
            return recipe
        depth = self.kit.manifest.emulator_depth
        outer = self.kit.manifest.split.outer(depth)
        numbers = layer_numbers(depth, outer if recipe.layers is None else recipe.layers)
        middle = [number for number in numbers if number not in outer]
        if middle:
            raise RecipeError(
                f"layers names {_listed(middle)}, but in the kit {self.kit.path} only the outer layers "
                f"{_listed(outer)} can train: what lies between stays as the model's owner made it; give some of "
                "these, or leave layers out"
            )
        return replace(recipe, layers=numbers)

    def _refuse_changed(self, recipe: Recipe) -> None:
        """Refuse what changes the weights that a return is put on."""
        refusal = None if recipe.adapter == "full" else ADAPTER_TYPES[recipe.adapter].unmergeable
        if refusal:
            raise RecipeError(
                f"adapter {recipe.adapter} cannot go back in a return, which changes weights of the kit "
                f"{self.kit.path}: take --adapter lora, or full"
            )
        if recipe.quantize is not None:
            raise RecipeError(
                f"quantize {recipe.quantize} changes weights of the kit {self.kit.path}, but a return is put on these "
                "as they are: leave quantize out"
            )

    def load(self, dtype: str = "auto", quantize: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load emulator and tokenizer; the model knows where it is from, for the adapter's config."""
        model, tokenizer = load_kit(self.kit, dtype)
        model.name_or_path = str(self.kit.path.absolute())
        return model, tokenizer

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer alone."""
        return kit_tokenizer(self.kit)

    def check_tuned(self, model: nn.Module) -> None:
        """Check that a return would hold all that trains, as of an adapter that was trained before.

        Raises:
            RecipeError: Something trains outside of the outer layers or beside their tensors, or the adapter changes
                the kit's weights.
        """
        decoder = find_layers(model)
        outer = self.kit.manifest.split.outer(len(decoder.layers))
        inside = tuple(f"{decoder.path}.{number}." for number in outer)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (not name.startswith(inside) or ".modules_to_save." in name):
                raise RecipeError(
                    f"{name} would train, but a return holds only the tensors of the outer layers {_listed(outer)} of "
                    f"the kit {self.kit.path}: take an adapter in these layers, without modules_to_save"
                )
        for config in getattr(model, "peft_config", {}).values():
            for name, fitting in _FITTING.items():
                if (value := getattr(config, name, fitting[0])) not in fitting:
                    raise RecipeError(
                        f"the adapter has {name} {value}, but a return is put on the weights of the kit "
                        f"{self.kit.path} as they are: take another adapter"
                    )

    def returned(self, model: nn.Module, privacy: Mapping[str, Any] | None = None) -> dict[str, Callable[[Path], None]]:
        """The return. The tensors of complete layers are taken now: at the end they get the model's dtype again."""
        if isinstance(model, PeftModel):
            return {"return": partial(save_return, model=model, kit=self.kit, privacy=privacy)}
        tuned, dtype = _state(model, self.kit)
        return {"return": partial(_write_whole, tuned=tuned, dtype=dtype, kit=self.kit, privacy=privacy)}


def save_return(folder: Path, model: nn.Module, kit: Kit, privacy: Mapping[str, Any] | None = None) -> None:
    """Write what goes back to the owner: what LoRA adds to the outer layers, or else these as they are now.

    Args:
        folder: Where to; it must not exist.
        model: The kit's emulator, with or without PEFT adapters; left as it is.
        kit: The kit.
        privacy: What a private run says of itself.

    Raises:
        KitError: A value is not finite in the kit's dtype.
    """
    tensors = thin_layers(model, kit)
    if tensors is None:
        _write_whole(folder, *_state(model, kit), kit, privacy)
    else:
        write_return(folder, tensors, kit, privacy)


def _state(model: Any, kit: Kit) -> tuple[dict[str, Tensor], torch.dtype]:
    """The outer layers of an emulator, of `merged_layers`, and the dtype in which it was loaded."""
    return merged_layers(model, kit.manifest.split), model.get_input_embeddings().weight.dtype  # these never train


def _write_whole(
    folder: Path, tuned: Mapping[str, Tensor], dtype: torch.dtype, kit: Kit, privacy: Mapping[str, Any] | None
) -> None:
    """Write a return of whole tensors, in the kit's dtypes.

    An emulator in a narrower dtype than that of the kit's outer layers has these rounded. What was tuned is then put on
    the kit's own tensors, so that those which did not train are the kit's.
    """
    dtypes = {name: DTYPES[spec.dtype] for name, spec in kit.manifest.outer.items()}
    narrow = {name for name, own in dtypes.items() if torch.promote_types(own, dtype) != dtype}
    own = load_weights(kit, OUTER) if narrow else {}
    tensors = {}
    for name, tensor in tuned.items():
        if name in narrow:
            tensor = in_float64(own[name]) + (in_float64(tensor) - in_float64(own[name].to(dtype)))
        tensors[name] = tensor.to(dtypes[name])
    write_return(folder, tensors, kit, privacy)


def merged_layers(model: nn.Module, split: Split) -> dict[str, Tensor]:
    """The tensors of the outer layers, PEFT adapters in them merged; the model is left as it is.

    Returns:
        By the names of `emulator.model.outer_names`, on the CPU; floating-point ones in float32, or float64 where they
        are.
    """
    layers = find_layers(model).layers
    tensors = {}
    for place, number in places(split, len(layers)):
        for name, tensor in _merged(layers[number]).items():
            tensors[f"{place}.{name}"] = tensor.detach().cpu()
    return tensors


def thin_layers(model: nn.Module, kit: Kit) -> dict[str, Tensor] | None:
    """The factors that LoRA adds to the outer layers of a kit's emulator; the model is left unchanged.

    Returns:
        The tensors of a thin return, on the CPU. None where something else than plain LoRA was trained, or where the
        factors of a matrix are not smaller than itself.

    Raises:
        KitError: A value is not finite.
    """
    layers = find_layers(model).layers
    tensors: dict[str, Tensor] = {}
    for place, number in places(kit.manifest.split, len(layers)):
        tuners = {path: m for path, m in layers[number].named_modules() if isinstance(m, BaseTunerLayer)}
        factors = {path: _factors(module) for path, module in tuners.items()}
        loras = [m for m in tuners.values() if isinstance(m, LoraLayer)]
        own = {id(p) for m in loras for p in (*m.lora_A.parameters(), *m.lora_B.parameters())}
        if any(p.requires_grad and id(p) not in own for p in layers[number].parameters()):
            return None  # something trains besides LoRA's factors
        for path, pair in factors.items():
            name = f"{place}.{path}.weight"
            if pair is None or len(pair[1]) > largest_rank(kit.manifest.outer[name]):
                return None
            for end, factor in zip((UP, DOWN), pair, strict=True):
                check_finite(factor, f"what was tuned: {name}{end}")
            tensors |= zip((f"{name}{UP}", f"{name}{DOWN}"), (f.float() for f in canonical(*pair)), strict=True)
    return tensors or None


def _factors(module: BaseTunerLayer) -> tuple[Tensor, Tensor] | None:
    """A plain LoRA's factors with its scale in them, in float64 and as the weight lies; None for another adapter."""
    if not isinstance(module, LoraLayer) or len(module.active_adapters) != 1 or module.merged:
        return None
    [name] = module.active_adapters
    if name not in module.lora_A or name in module.lora_variant or module.lora_bias[name]:
        return None
    a_RI, b_OR = (part[name].weight.detach().cpu().double() for part in (module.lora_A, module.lora_B))
    scaled_OR = b_OR * module.scaling[name]
    return (a_RI.T, scaled_OR.T) if getattr(module, "fan_in_fan_out", False) else (scaled_OR, a_RI)


def _merged(layer: nn.Module) -> dict[str, Tensor]:
    """State of a copy of a layer, merged: merging into half precision and taking out again would leave its rounding."""
    if not any(isinstance(module, BaseTunerLayer) for module in layer.modules()):
        return layer.state_dict()
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
