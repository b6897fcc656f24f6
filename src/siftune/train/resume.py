"""Resume a run: find its checkpoint, and refuse one of another run."""

import hashlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerState

from siftune.base.errors import RecipeError
from siftune.base.text import counted
from siftune.data.rows import WEIGHT
from siftune.models.adapters.registry import ADAPTER_TYPES, adapter_type_of
from siftune.models.adapters.saved import read_config
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe, differences
from siftune.train.callbacks import evaluations_since_best
from siftune.train.folder.checkpoints import identity_in, named_checkpoint, newest_checkpoint, step_of
from siftune.train.folder.run_folder import RECIPE, ROWS, RunFolder
from siftune.train.folder.weights import holds_tuned, read_about
from siftune.train.trainer import LayerTrainer, SiftTrainer, planned_steps

# settings that a resumed run may change: length, logs and evaluation; checkpoints themselves describe adapters and rows
_MAY_CHANGE = {
    "out", "resume", "save_every", "eval_every", "patience", "log_every", "report_to",
    "steps", "epochs", "eval", "adapter", "rank", "alpha", "targets", "layers",
    "train", "limit", "columns", "target", "target_share", "method",
    "drop_rows", "eval_share", "bad_rows", "sharding", "deterministic",
}  # fmt: skip
_PASSES = {"batch_size", "accumulate"}  # may change together, if a step has as many rows as before
_PATHS = ("model", "from_adapter", "keep", "template")


def find_checkpoint(recipe: Recipe, folder: RunFolder) -> Path:
    """Checkpoint of a recipe with `resume`.

    Raises:
        InputError: There is no complete one.
    """
    if recipe.resume is True:
        return newest_checkpoint(folder.checkpoints, fresh=folder.is_fresh())
    return named_checkpoint(str(recipe.resume))


def refuse_other_source(checkpoint: Path, identity: Mapping[str, str]) -> None:
    """Refuse to resume on another kit than that of a checkpoint.

    Args:
        checkpoint: Folder of a complete checkpoint.
        identity: Of the `Source` that the run would resume on.

    Raises:
        RecipeError: The kit differs.
    """
    before = identity_in(checkpoint)
    if before.get("kit") != identity.get("kit"):
        was, now = (f"the kit {sides['kit'][:12]}…" if "kit" in sides else "no kit" for sides in (before, identity))
        raise RecipeError(
            f"{checkpoint} is of a run on {was}, but its model is now {now} (SHA-256 of the manifest): restore the "
            "kit, or train in another folder with --out"
        )


def digest_of_tokens(data: Dataset) -> str:
    """Hash of tokenised rows: token ids, labels and weights."""
    digest = hashlib.sha256()
    for column in ("input_ids", "labels"):
        lists = data.data.column(column).combine_chunks()
        for values in (lists.value_lengths(), lists.flatten()):
            digest.update(values.to_numpy().astype(np.int64).tobytes())
    if WEIGHT in data.column_names:
        digest.update(array("d", data[WEIGHT]).tobytes())
    return digest.hexdigest()


def has_ended(checkpoint: Path, recipe: Recipe, digest: str, trainer: SiftTrainer, folder: RunFolder) -> bool:
    """Check a checkpoint, and return whether its run was killed after the last step, before its results were written.

    Args:
        checkpoint: Folder of a complete checkpoint.
        recipe: Resolved settings.
        digest: `digest_of_tokens` of the training rows.
        trainer: The Trainer of the run that resumes.
        folder: Its folder.

    Raises:
        RecipeError: The checkpoint is of another run, or nothing is left to do.
    """
    _check_recipe(checkpoint, recipe, digest)
    if isinstance(trainer, LayerTrainer):
        _check_layers(checkpoint, trainer)
    else:
        _check_adapter(checkpoint, trainer.model.peft_config["default"])
    steps = planned_steps(trainer.args, len(trainer.train_dataset))
    since = evaluations_since_best(TrainerState.load_from_json(str(checkpoint / "trainer_state.json")))
    if step_of(checkpoint) >= steps:
        more = "--steps" if recipe.steps else "--epochs"  # steps take precedence
        end = f"all of {counted(steps, 'step')} are done; give more {more} to continue"
    elif recipe.patience is not None and since >= recipe.patience:
        end = f"{counted(since, 'evaluation')} in a row did not improve; give more --patience to continue"
    else:
        return False
    if folder.has_results(checkpoint):
        raise RecipeError(f"{checkpoint} is the end of its run: {end}")
    return True


def _check_recipe(checkpoint: Path, recipe: Recipe, digest: str) -> None:
    """Refuse other settings or rows than those of the checkpoint's run."""
    run = checkpoint.absolute().parents[1]
    if not (run / RECIPE).is_file():
        return
    before: Recipe = load_recipe(run / RECIPE)
    same_rows = before.batch_size * before.accumulate == recipe.batch_size * recipe.accumulate
    free = _MAY_CHANGE | _PASSES if same_rows else _MAY_CHANGE
    method = [("method", before.method, recipe.method)] if before.method != recipe.method else []
    for name, was, now in [*method, *differences(before, recipe, free)]:
        if name in _PATHS and was and now and Path(was).expanduser().resolve() == Path(now).expanduser().resolve():
            continue
        raise RecipeError(
            f"{checkpoint} is of a run with {name} {was}, this recipe has {now}: set {name} as that run did, or train "
            "in another folder with --out"
        )
    if (run / ROWS).is_file() and (run / ROWS).read_bytes().strip() != digest.encode():
        raise RecipeError(
            f"{checkpoint} is of a run on other training rows: restore files and settings such as limit, or train in "
            "another folder with --out"
        )


def _check_layers(checkpoint: Path, trainer: LayerTrainer) -> None:
    """Refuse a checkpoint of other layers."""
    if not holds_tuned(checkpoint):
        raise _other_run(checkpoint, "it holds an adapter", "adapter full", "adapter")
    about = read_about(checkpoint)
    before, now = list(about.layers), list(trainer.about.layers)
    if before != now:
        raise _other_run(checkpoint, f"it holds the layers {before}", str(now), "layers")


def _check_adapter(checkpoint: Path, config: Any) -> None:
    """Refuse a checkpoint of another adapter than that of a PEFT config."""
    if holds_tuned(checkpoint):
        raise _other_run(checkpoint, "it holds tuned layers", "an adapter", "adapter")
    saved = read_config(checkpoint)
    adapter_type = ADAPTER_TYPES[str(adapter_type_of(vars(config)))]
    options = {key: name for name, key in adapter_type.keys.items() if name != "dropout"}
    modules = dict.fromkeys(("target_modules", "target_parameters") & vars(config).keys(), "targets and layers")
    names = {**dict.fromkeys(adapter_type.marks, "adapter"), **options, **modules}
    for key, name in names.items():
        both = saved.get(key), getattr(config, key)
        before, now = (sorted(value) if isinstance(value, list | tuple | set) else value for value in both)
        if before == now:
            continue
        if isinstance(before, list) and isinstance(now, list):  # long lists: show the differences only
            only_before, only_now = [x for x in before if x not in now], [x for x in now if x not in before]
            before, now = only_before or "nothing", f"{only_now or 'nothing'} instead"
        raise _other_run(checkpoint, f"its adapter has {key} = {before}", str(now), name)


def _other_run(checkpoint: Path, what: str, asked: str, name: str) -> RecipeError:
    return RecipeError(
        f"{checkpoint} is of another run: {what}, this recipe asks for {asked}; set {name} as that run did, or train "
        "in another folder with --out"
    )
