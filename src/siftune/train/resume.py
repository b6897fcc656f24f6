"""Resume a run: find its checkpoint, and refuse one of another run."""

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerState, TrainingArguments

from siftune.base.errors import RecipeError
from siftune.base.jsonable import parsed
from siftune.base.words import counted
from siftune.data.rows import WEIGHT
from siftune.models.adapters.registry import ADAPTER_TYPES, adapter_type_of
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe, differences
from siftune.train.callbacks import (
    evaluations_since_best,
)
from siftune.train.folder.checkpoints import fault_of, newest_checkpoint, step_of
from siftune.train.folder.run import RECIPE, ROWS, RunFolder
from siftune.train.folder.weights import holds_tuned, read_about
from siftune.train.trainer import planned_steps

# of a run that goes on: how long, what is told and measured; and what checkpoints themselves tell of adapters and rows
_MAY_CHANGE = {
    "out", "resume", "save_every", "eval_every", "patience", "log_every", "report_to",
    "steps", "epochs", "eval", "eval_split", "adapter", "rank", "alpha", "targets", "layers", "outside",
    "train", "train_split", "limit", "format", "target", "target_share", "method",
    "drop_rows", "eval_share", "bad_rows", "sharding", "auto_batch",
}  # fmt: skip
_HALVED = ("batch_size", "accumulate")  # by `auto_batch`, which keeps the rows of a step
_NAMED_IN_FULL = ("model", "from_adapter")  # in a run's recipe, where they are folders


def find_checkpoint(recipe: Recipe, folder: RunFolder) -> Path:
    """The checkpoint to go on from, of a recipe that says to resume.

    Raises:
        InputError: There is no complete one where the recipe says.
    """
    if recipe.resume is True:
        return newest_checkpoint(folder.checkpoints)
    given = Path(str(recipe.resume)).expanduser()
    if (fault := fault_of(given)) is not None:
        why = f" ({fault})" if given.is_dir() else ""
        raise RecipeError(f"{given} is no complete checkpoint{why}; give a folder RUN/checkpoints/checkpoint-N.")
    return given


def check_same(checkpoint: Path, recipe: Recipe, rows: str) -> None:
    """Refuse to go on with other settings or rows, by their `digest_of`, than the checkpoint's run was begun with.

    What makes an adapter another one is seen from the checkpoint itself: see `check_adapter`.

    Raises:
        RecipeError: They differ; the message names what, and both values.
    """
    run = checkpoint.absolute().parents[1]
    if not (run / RECIPE).is_file():
        return
    before: Recipe = load_recipe(run / RECIPE)
    free = {*_MAY_CHANGE, *(_HALVED if recipe.auto_batch and _rows_of_step(before) == _rows_of_step(recipe) else ())}
    other = [("method", before.method, recipe.method)] if before.method != recipe.method else []
    for name, was, now in [*other, *differences(before, recipe, free)]:
        if name in _NAMED_IN_FULL and was and now and _in_full(was) == _in_full(now):
            continue
        raise RecipeError(
            f"{checkpoint} is of a run with {name} {was}, this recipe has {now}: set {name} as that run did, or train "
            "in another folder with --out"
        )
    if (run / ROWS).is_file() and (run / ROWS).read_text(encoding="utf-8").strip() != rows:
        raise RecipeError(
            f"{checkpoint} is of a run on other training rows than {recipe.train} holds now: bring these back, or "
            "train in another folder with --out"
        )


def _rows_of_step(recipe: Recipe) -> int:
    return recipe.batch_size * recipe.accumulate


def _in_full(name: str) -> Path:
    return Path(name).expanduser().resolve()


def digest_of(data: Dataset) -> str:
    """What tells tokenised rows from others: a hash of their tokens, what is learned of them, and their weights."""
    digest = hashlib.sha256()
    for column in ("input_ids", "labels"):
        for chunk in data.data.column(column).chunks:
            digest.update(_with_lengths(chunk))
    if WEIGHT in data.column_names:
        digest.update(array("d", data[WEIGHT]).tobytes())
    return digest.hexdigest()


def _with_lengths(lists: Any) -> bytes:
    """Lists of numbers, each behind its length, as int64."""
    lengths, values = lists.value_lengths().to_numpy(), lists.flatten().to_numpy()
    starts = lengths.cumsum() - lengths + np.arange(len(lengths))
    numbers = np.empty(len(lengths) + len(values), dtype=np.int64)
    is_length = np.zeros(len(numbers), dtype=bool)
    is_length[starts] = True
    numbers[is_length], numbers[~is_length] = lengths, values
    return numbers.tobytes()


def end_of(checkpoint: Path, arguments: TrainingArguments, rows: int, patience: int | None = None) -> str | None:
    """Why nothing is left to do from a checkpoint on, of a run on so many rows; None where something is."""
    steps = planned_steps(arguments, rows)
    if step_of(checkpoint) >= steps:
        return (
            f"{checkpoint} is the end of its run: all of {steps} steps are done, and nothing was touched; give more "
            "--steps or --epochs to go on"
        )
    since = evaluations_since_best(TrainerState.load_from_json(str(checkpoint / "trainer_state.json")))
    if patience is not None and since >= patience:
        return (
            f"{checkpoint} is the end of its run: {counted(since, 'evaluation')} in a row found no less held-out loss, "
            "and nothing was touched; give more --patience to go on"
        )
    return None


def check_layers(checkpoint: Path, layers: Sequence[int], outside: Sequence[str] = ()) -> None:
    """Refuse a checkpoint that is not of the layers, by their numbers, and what else the recipe has train.

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
    """Refuse a checkpoint whose adapter is not the one on the model, of which `config` is PEFT's.

    Raises:
        RecipeError: They differ; the message names the setting.
    """
    if holds_tuned(checkpoint):
        raise _other_run(checkpoint, "it holds layers that were tuned themselves", "an adapter in them", "adapter")
    path = checkpoint / "adapter_config.json"
    try:
        saved = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read ({error}); resume from another checkpoint.") from error
    for key, name in _what_tells(config).items():
        of_checkpoint, of_recipe = _plain(saved.get(key)), _plain(getattr(config, key))
        if of_checkpoint != of_recipe:
            of_checkpoint, of_recipe = _difference(of_checkpoint, of_recipe)
            raise _other_run(checkpoint, f"its adapter has {key} = {of_checkpoint}", str(of_recipe), name)


def _what_tells(config: Any) -> dict[str, str]:
    """What makes an adapter another one: key of its config -> how a recipe calls it."""
    carrier = ADAPTER_TYPES[str(adapter_type_of(vars(config)))]
    kept = {key: name for name, key in carrier.keys.items() if name not in ("dropout", "init")}
    return {**dict.fromkeys(carrier.marks, "adapter"), **kept, "target_modules": "targets and layers"}


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
