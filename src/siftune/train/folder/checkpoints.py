"""Checkpoints in a run folder: integrity, and the newest complete one (ours).

While a checkpoint is written it holds a mark. At the end come a list of its files with sizes and hashes, and the mark
is removed. A process that was killed while saving, or a disk that lost data, therefore never makes a run resume from
less than was saved.
"""

import json
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from siftune.base.errors import InputError, TrainingError
from siftune.base.files import hash_of, to_disk, why_unreadable, write_beside
from siftune.base.jsonable import parsed
from siftune.engine.ranks import wait_for_all

SEAL = "files.json"  # name -> [bytes, sha256]
_MARK = ".unfinished"
_STATE = "trainer_state.json"
_STRANGE = (KeyError, ValueError, TypeError, AttributeError, IndexError)  # of states that are none
_PARTS = ("optimizer.pt", "scheduler.pt")  # of checkpoints of earlier versions, which have no list

logger = logging.getLogger(__name__)


class Sealing(TrainerCallback):  # type: ignore[misc]
    """Ends a checkpoint when every other callback has written its part of it, and lets older ones go only then.

    It must stand behind all of them.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """List the files."""
        wait_for_all()  # every rank writes its generators' state
        if args.should_save:
            seal(checkpoint_of(args, state))
            rotate_checkpoints(args.output_dir, args.save_total_limit, state.best_model_checkpoint, use_mtime=True)


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """Folder of the checkpoint of this step."""
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


@contextmanager
def read_of(checkpoint: str | None) -> Iterator[None]:
    """Turn a checkpoint's file that is no state of a run, though it is as it was written, into one sentence.

    Raises:
        TrainingError: Something in the block could not be read from it.
    """
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, SafetensorError, *_STRANGE) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise TrainingError(
            f"{checkpoint} cannot be read ({why_unreadable(error)}): go on from another checkpoint, or train in "
            "another folder."
        ) from error


def begin(checkpoint: Path) -> None:
    """Mark a folder as one that is being written, before anything else in it is."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    with (checkpoint / _MARK).open("wb"):
        pass
    to_disk(checkpoint, all_in_it=False)
    (checkpoint / SEAL).unlink(missing_ok=True)


def seal(checkpoint: Path) -> None:
    """Bring a checkpoint that has all its files to the disk itself, list them, and take off the mark."""
    to_disk(checkpoint)
    files = {name: [path.stat().st_size, hash_of(path)] for name, path in _files(checkpoint).items()}
    with write_beside(checkpoint / SEAL) as [beside]:
        beside.write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
    (checkpoint / _MARK).unlink()
    to_disk(checkpoint, all_in_it=False)


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder is a checkpoint that is as it was written."""
    return fault_of(checkpoint) is None


def fault_of(checkpoint: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint; None where it is whole. Without `hashes` names and sizes alone are looked at."""
    if (checkpoint / _MARK).exists():
        return "it was not written to its end"
    try:
        state = parsed((checkpoint / _STATE).read_text(encoding="utf-8"))
        int(state["global_step"])
        listed = parsed((checkpoint / SEAL).read_text(encoding="utf-8")) if (checkpoint / SEAL).exists() else None
        return _without_list(checkpoint) if listed is None else _against(checkpoint, listed, hashes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__


def _without_list(checkpoint: Path) -> str | None:
    missing = [name for name in _PARTS if not (checkpoint / name).is_file()]
    if not any(checkpoint.glob("*.safetensors")):
        missing.append("its weights")
    return f"{', '.join(missing)} missing" if missing else None


def _against(checkpoint: Path, listed: Any, hashes: bool) -> str | None:
    """Compare files with the list of them."""
    if not isinstance(listed, dict):
        return f"{SEAL} is no list of files"
    found = _files(checkpoint)
    for name, [size, digest] in listed.items():
        if name not in found:
            return f"{name} is missing"
        if found[name].stat().st_size != size or (hashes and hash_of(found[name]) != digest):
            return f"{name} is not what was written"
    return None if _STATE in listed else f"{SEAL} does not name {_STATE}"


def _files(checkpoint: Path) -> dict[str, Path]:
    """Files of a checkpoint by their names in it, but for list and mark."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return {path.relative_to(checkpoint).as_posix(): path for path in paths if path.name not in (SEAL, _MARK)}


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done at a complete checkpoint."""
    return int(parsed((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])


def best_in(folder: Path, checkpoint: Path) -> Path | None:
    """The checkpoint of least held-out loss up to another; None where `folder` does not have it."""
    best = parsed((checkpoint / "trainer_state.json").read_text(encoding="utf-8")).get("best_global_step")
    path = folder / f"checkpoint-{best}"
    return path if path.is_dir() else None


def whole_checkpoints(folder: Path) -> Iterator[Path]:
    """Checkpoints in `folder` that are as they were written, the newest first."""
    return (path for path in reversed(checkpoints_in(folder)) if fault_of(path) is None)


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint in `folder` that is whole; one that is half-written or damaged is passed over.

    Raises:
        InputError: When there is none.
    """
    for path in reversed(checkpoints_in(folder)):
        if (fault := fault_of(path)) is None:
            return path
        logger.warning("%s is not whole: %s; the one before it is looked at", path, fault)
    damaged = any(fault_of(path, hashes=False) is None for path in checkpoints_in(folder))
    instead = "all are damaged: train in another folder" if damaged else "train without --resume"
    raise InputError(f"No complete checkpoint in {folder}; {instead}.")


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders of checkpoints in the order of their steps."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))
