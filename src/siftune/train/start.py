"""How an adapter begins: from an adapter that was trained before, or from a part of the base's weights.

Where it begins from a part of the base (PiSSA, OLoRA), PEFT takes that part off the base's weights. What is saved at
the end must fit the base as it is, so PEFT turns it into an ordinary LoRA of twice the rank: it needs the first values.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from siftune.base.errors import AdapterError, RecipeError
from siftune.base.jsonable import parsed
from siftune.models.adapters.registry import CARRIERS, carrier_of
from siftune.recipe.schema import Recipe
from siftune.train.tuned_layers import holds_tuned

_ADOPTED = ("adapter", "rank", "alpha")  # of a recipe: what an adapter says of itself
_INITIAL = "initial"  # folder beside the checkpoints


def adapter_folder(name: str) -> Path:
    """The folder of the adapter that a run's folder, or its own, stands for.

    Raises:
        AdapterError: There is none, or layers were tuned themselves.
    """
    given = Path(name).expanduser()
    for folder in (given / "adapter", given):
        if (folder / "adapter_config.json").is_file():
            return folder
        if holds_tuned(folder):
            raise AdapterError(
                f"{folder} holds layers that were tuned themselves, no adapter: export it to a model first"
            )
    raise AdapterError(f"from_adapter is {name}, but there is no adapter_config.json in it or in its folder adapter")


def adopted(recipe: Recipe) -> Recipe:
    """Fill in what the adapter says that a recipe's `from_adapter` names: its kind, rank and alpha.

    Raises:
        AdapterError: It is of a kind that is not known, or cannot be read.
        RecipeError: The recipe asks for something else.
    """
    if recipe.from_adapter is None:
        return recipe
    path = adapter_folder(recipe.from_adapter) / "adapter_config.json"
    try:
        config = parsed(path.read_text(encoding="utf-8"))
        kind = carrier_of(config)
        keys = {"adapter": "peft_type"} if kind is None else CARRIERS[kind].keys
        own = {name: config[key] for name, key in keys.items() if name in _ADOPTED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} can't be read ({error}); save the adapter again.") from error
    if kind is None:
        raise AdapterError(f"{path} is of the kind {own['adapter']}; known kinds: {', '.join(CARRIERS)}")
    own["adapter"] = kind
    for name, value in own.items():
        asked = getattr(recipe, name)
        if asked not in (getattr(Recipe, name), value):
            raise RecipeError(f"{name} is {asked}, but the adapter in {path.parent} has {value}: leave {name} out")
    return replace(recipe, **own)


def keep_initial(model: PeftModel, folder: Path) -> None:
    """Write an adapter's first values beside a run's checkpoints, for `save_adapter`."""
    write_adapter(model, folder / _INITIAL)


def write_adapter(model: PeftModel, folder: Path, **given: Any) -> None:
    """Write an adapter in PEFT's format, without PEFT's template of a card, which says nothing of it.

    Embeddings are the base's: PEFT need not read the base's config again, or ask a hub, to find that out.

    Args:
        model: The tuned model.
        folder: Where to; a card that stands there goes.
        given: Further arguments of PEFT's `save_pretrained`.
    """
    model.save_pretrained(folder, save_embedding_layers=False, **given)
    (folder / "README.md").unlink(missing_ok=True)


def save_adapter(model: PeftModel, path: Path, checkpoints: Path) -> None:
    """Write an adapter that fits the base as it was; `keep_initial` may have left first values in `checkpoints`."""
    initial = checkpoints / _INITIAL
    first = str(initial) if initial.is_dir() else None
    with warnings.catch_warnings():  # PEFT asks for the very conversion that it is making here
        warnings.filterwarnings("ignore", message="(PiSSA|OLoRA) changes the base weights")
        write_adapter(model, path, path_initial_model_for_weight_conversion=first)
