"""Going on from a checkpoint: which one, from which step, and whether it is of this run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from siftune.config import Recipe
from siftune.errors import RecipeError
from siftune.trainer.run_folder import RunFolder, is_complete, newest_checkpoint
from siftune.trainer.tuned_layers import holds_tuned, read_about

# what makes an adapter another one -> how a recipe calls it
_SAME = {
    "r": "rank",
    "lora_alpha": "alpha",
    "use_dora": "adapter",
    "use_rslora": "adapter",
    "target_modules": "targets and layers",
}


def find_checkpoint(recipe: Recipe, folder: RunFolder) -> Path:
    """The checkpoint to go on from, of a recipe that says to resume.

    Raises:
        InputError: There is no complete one where the recipe says.
    """
    if recipe.resume is True:
        return newest_checkpoint(folder.checkpoints)
    given = Path(str(recipe.resume)).expanduser()
    if not is_complete(given):
        raise RecipeError(f"{given} is no complete checkpoint; give a folder RUN/checkpoints/checkpoint-N.")
    return given


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done at a complete checkpoint."""
    return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def check_layers(checkpoint: Path, layers: Sequence[int], outside: Sequence[str] = ()) -> None:
    """Refuse a checkpoint that is not of the layers that the recipe asks for.

    Args:
        checkpoint: A complete checkpoint.
        layers: Numbers of the layers whose own weights train, from 0, ascending.
        outside: What else trains.

    Raises:
        RecipeError: They differ, or the checkpoint is of a run with an adapter.
    """
    if not holds_tuned(checkpoint):
        raise _other_run(checkpoint, "it holds an adapter", "adapter full", "adapter")
    about = read_about(checkpoint)
    for name, saved, asked in (("layers", about.layers, layers), ("outside", about.outside, outside)):
        if list(saved) != list(asked):
            raise _other_run(checkpoint, f"it holds the {name} {list(saved)}", str(list(asked)), name)


def check_adapter(checkpoint: Path, config: Any) -> None:
    """Refuse a checkpoint whose adapter is not the one that the recipe asks for.

    Args:
        checkpoint: A complete checkpoint.
        config: PEFT's config of the adapter on the model.

    Raises:
        RecipeError: They differ; the message names the setting.
    """
    if holds_tuned(checkpoint):
        raise _other_run(checkpoint, "it holds layers that were tuned themselves", "an adapter in them", "adapter")
    path = checkpoint / "adapter_config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read ({error}); resume from another checkpoint.") from error
    for key, name in _SAME.items():
        of_checkpoint, of_recipe = _plain(saved.get(key)), _plain(getattr(config, key))
        if of_checkpoint != of_recipe:
            of_checkpoint, of_recipe = _difference(of_checkpoint, of_recipe)
            raise _other_run(checkpoint, f"its adapter has {key} = {of_checkpoint}", str(of_recipe), name)


def _other_run(checkpoint: Path, what: str, asked: str, name: str) -> RecipeError:
    return RecipeError(
        f"{checkpoint} is of another run: {what}, this recipe asks for {asked}; set {name} as that run did, or train "
        "in another folder with --out."
    )


def _difference(one: Any, other: Any) -> tuple[Any, Any]:
    """Leave out of two lists, which may be long, what they share."""
    if not isinstance(one, list) or not isinstance(other, list):
        return one, other
    only_one, only_other = [x for x in one if x not in other], [x for x in other if x not in one]
    return only_one or "nothing", f"{only_other or 'nothing'} in their place"


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | tuple | set) else value
