"""Load adapters that were saved: by siftune in a run folder, or by PEFT anywhere."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from siftune.errors import ModelError
from siftune.models.source import load_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def adapter_folder(path: str | Path) -> Path:
    """The adapter in `path`: a run folder's, or `path` itself.

    Raises:
        ModelError: When there is none.
    """
    path = Path(path)
    for folder in (path / "adapter", path):
        if (folder / "adapter_config.json").is_file():
            return folder
    what = (
        "holds no adapter (no adapter/adapter_config.json, no adapter_config.json)" if path.is_dir() else "is no folder"
    )
    raise ModelError(f"{path} {what}; give a run folder of `siftune train`, or an adapter in PEFT's format.")


def base_of(adapter: Path) -> str:
    """Name of the model that an adapter was trained on: a folder, a hub id or smollm2.

    A run folder's recipe knows best, because PEFT's configuration holds the folder that the model was in then.
    """
    recipe = adapter.parent / "recipe.yaml"
    if adapter.name == "adapter" and recipe.is_file():
        from siftune.config import load_recipe

        return load_recipe(recipe).model
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{adapter}/adapter_config.json names no base model; give it with --base.")
    return str(base)


def load_tuned(
    adapter: Path, base: str | None = None, dtype: str = "auto"
) -> tuple["PeftModel", "PreTrainedTokenizerBase"]:
    """Load a base model and put a saved adapter on it, for inference.

    Args:
        adapter: Folder in PEFT's format.
        base: Base model in place of the one that the adapter was trained on.
        dtype: Number format of the base; see `load_model`.

    Raises:
        ModelError: When the base cannot be loaded, or the adapter does not fit it.
    """
    from peft import PeftModel

    source = base or base_of(adapter)
    model, tokenizer = load_model(source, dtype)
    try:
        return PeftModel.from_pretrained(model, adapter), tokenizer
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"The adapter in {adapter} does not fit {source}: {reason}") from error
