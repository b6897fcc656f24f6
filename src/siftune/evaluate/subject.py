"""What the user names to be measured: a run folder, an adapter folder, or a model."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from siftune.config import Recipe
from siftune.errors import AdapterError, ModelError
from siftune.models.source import load_model
from siftune.recipe_file import load_recipe


@dataclass(frozen=True)
class Subject:
    """A model, and the adapter on it if there is one.

    Attributes:
        name: As the user named it.
        base: Source of the base model, for `load_model`.
        adapter: Folder of the adapter in PEFT's format; None for a model by itself.
        recipe: The recipe of a run folder; None otherwise.
    """

    name: str
    base: str
    adapter: Path | None = None
    recipe: Recipe | None = None


def find_subject(source: str) -> Subject:
    """Tell what a name stands for.

    Args:
        source: A run folder (`recipe.yaml` and `adapter/`), a PEFT adapter folder (`adapter_config.json`), or
            anything that `load_model` takes.

    Raises:
        ModelError: A run folder has no adapter in it.
        AdapterError: An adapter's config can't be read, or names no base model.
        RecipeError: A run's recipe can't be read.
    """
    path = Path(source).expanduser()
    if (path / "recipe.yaml").is_file():
        if not (path / "adapter" / "adapter_config.json").is_file():
            raise ModelError(f"the run folder {path} has no adapter yet; finish the run with siftune train --resume.")
        recipe: Recipe = load_recipe(path / "recipe.yaml")
        return Subject(source, recipe.model, path / "adapter", recipe)
    if (path / "adapter_config.json").is_file():
        return Subject(source, _base_of(path), path)
    return Subject(source, source)


def load_subject(subject: Subject, dtype: str = "auto", exact: bool = False) -> tuple[Any, Any]:
    """Load model and tokenizer, and put the adapter on.

    Args:
        subject: What to load.
        dtype: Number format of the base, for `load_model`.
        exact: Keep the adapter in float32 whatever the base's dtype, as for merging; slower on many machines.

    Returns:
        The model in eval mode on the accelerator if there is one, PEFT-wrapped if there is an adapter; and the
        tokenizer.

    Raises:
        ModelError: As `load_model`.
        AdapterError: The adapter can't be read or doesn't fit the model.
    """
    import torch

    model, tokenizer = load_model(subject.base, dtype)
    if subject.adapter is not None:
        model = _with_adapter(model, subject.adapter, subject.base, exact)
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval(), tokenizer


def _base_of(adapter: Path) -> str:
    """Read which model an adapter belongs to."""
    path = adapter / "adapter_config.json"
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterError(f"{path} can't be read ({error}); save the adapter again.") from error
    if not isinstance(base, str) or not base:
        raise AdapterError(f"{path} names no base model; fill in base_model_name_or_path.")
    return base


def _with_adapter(model: Any, adapter: Path, base: str, exact: bool) -> Any:
    """Put an adapter on its base model."""
    from peft import PeftModel
    from safetensors import SafetensorError

    if not any((adapter / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise AdapterError(f"{adapter} has no weights (adapter_model.safetensors); save the adapter again.")
    try:
        with warnings.catch_warnings():
            # PEFT goes on with random or zero weights where some are missing, and only warns
            warnings.filterwarnings("error", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", category=FutureWarning)  # between PEFT and transformers
            # in the base's dtype, as in training: float32 products are slow on many machines
            return PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=exact)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, UserWarning) as error:
        reason = " ".join(str(error).split())[:200]
        raise AdapterError(
            f"the adapter in {adapter} doesn't fit the model {base}: {reason}; give the adapter's own base model."
        ) from error
