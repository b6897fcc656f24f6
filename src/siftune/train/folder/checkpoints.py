"""Checkpoints in a run folder: integrity, and the newest complete one (ours).

While a checkpoint is written it holds a mark. At the end come a list of its files with sizes and hashes, and the mark
is removed. A process that was killed while saving, or a disk that lost data, therefore never makes a run resume from
less than was saved. The callbacks that write a checkpoint's files are in saving.py. Nothing here imports torch, so that
commands find a checkpoint quickly.
"""

import json
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError

from siftune.base.environment import ran_out
from siftune.base.errors import InputError, RecipeError, TrainingError
from siftune.base.files import hash_of, to_disk, why_unreadable, write_beside
from siftune.base.json_files import read_json
from siftune.base.text import one_line

logger = logging.getLogger(__name__)

SEAL = "files.json"  # name -> [bytes, sha256]
_MARK = ".unfinished"
_STATE = "trainer_state.json"
SOURCE = "source.json"  # of a kit: hashes by name, see `saving.SourceNote`
_ADVICE = "resume from another checkpoint, or train in another folder"
_READING = (  # errors of reading a file that is no state of a run
    pickle.UnpicklingError, RuntimeError, OSError, EOFError, SafetensorError,
    KeyError, ValueError, TypeError, AttributeError, IndexError,
)  # fmt: skip


class _Entry(BaseModel):
    """A line of the Trainer's history, with other figures besides."""

    model_config = ConfigDict(strict=True)
    step: int
    loss: float = 0
    eval_loss: float = 0


class _State(BaseModel):
    """Fields of `trainer_state.json` that the Trainer or siftune calculate with."""

    model_config = ConfigDict(strict=True)
    global_step: int = Field(ge=0, le=2**53)
    log_history: list[_Entry] = []
    best_global_step: int | None = None
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    epoch: float | None = None
    eval_steps: float | None = None
    logging_steps: float | None = None
    save_steps: float | None = None
    num_input_tokens_seen: int = 0
    total_flos: float = 0
    stateful_callbacks: dict[str, Any] = {}


def identity_in(checkpoint: Path) -> dict[str, str]:
    """The identity of what a complete checkpoint was trained on; empty for an ordinary model.

    Raises:
        InputError: It cannot be read.
    """
    path = checkpoint / SOURCE
    return read_json(path, dict[str, str], _ADVICE) if path.exists() else {}


@contextmanager
def read_of(checkpoint: str | None) -> Iterator[None]:
    """Report a file of a checkpoint that cannot be read although it is intact.

    Raises:
        TrainingError: Reading failed in the block.
    """
    try:
        yield
    except _READING as error:
        if ran_out(error):
            raise
        raise TrainingError(f"{checkpoint} cannot be read ({why_unreadable(error)}): {_ADVICE}") from error


def begin(checkpoint: Path) -> None:
    """Mark a checkpoint as unfinished before anything else is written to it."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    with (checkpoint / _MARK).open("wb"):
        pass
    to_disk(checkpoint, all_in_it=False)
    (checkpoint / SEAL).unlink(missing_ok=True)


def seal(checkpoint: Path) -> None:
    """Flush a complete checkpoint to disk, list its files, and remove the mark."""
    to_disk(checkpoint)
    files = {name: [path.stat().st_size, hash_of(path)] for name, path in _files(checkpoint).items()}
    with write_beside(checkpoint / SEAL) as [beside]:
        beside.write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
    (checkpoint / _MARK).unlink()
    to_disk(checkpoint, all_in_it=False)


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder is an intact checkpoint."""
    return fault_of(checkpoint) is None


def fault_of(checkpoint: Path, hashes: bool = True) -> str | None:
    """The fault of a checkpoint; None if it is intact. Without `hashes` only names and sizes are checked."""
    if (checkpoint / _MARK).exists():
        return "it was not written to its end"
    try:
        _state(checkpoint)
        listed = read_json(checkpoint / SEAL, dict[str, tuple[int, str]], _ADVICE)
        if _STATE not in listed:
            return f"{SEAL} does not list {_STATE}"
        files = _files(checkpoint)
        for name, (size, digest) in listed.items():
            if name not in files:
                return f"{name} is missing"
            if files[name].stat().st_size != size or (hashes and hash_of(files[name]) != digest):
                return f"{name} is not what was written"
    except InputError as error:
        return str(error)
    except OSError as error:
        return one_line(str(error))
    return None


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done at a complete checkpoint."""
    return _state(checkpoint).global_step


def _state(checkpoint: Path) -> _State:
    return read_json(checkpoint / _STATE, _State, _ADVICE)


def best_in(folder: Path, checkpoint: Path) -> Path | None:
    """The checkpoint in `folder` with the least held-out loss up to another one; None if it is not there."""
    path = folder / f"checkpoint-{_state(checkpoint).best_global_step}"
    return path if path.is_dir() else None


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders of checkpoints in the order of their steps, complete or not."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def whole_checkpoints(folder: Path, hashes: bool = True) -> Iterator[Path]:
    """Intact checkpoints, the newest first. Without `hashes` only names and sizes are checked."""
    return (path for path in reversed(checkpoints_in(folder)) if fault_of(path, hashes) is None)


def named_checkpoint(name: str, hashes: bool = True) -> Path:
    """The checkpoint that a recipe's `resume` names.

    Args:
        name: Its folder.
        hashes: As for `fault_of`.

    Raises:
        RecipeError: It is not complete.
    """
    checkpoint = Path(name).expanduser()
    if (fault := fault_of(checkpoint, hashes)) is not None:
        why = f" ({fault})" if checkpoint.is_dir() else ""
        raise RecipeError(f"{checkpoint} is no complete checkpoint{why}; give a folder RUN/checkpoints/checkpoint-N")
    return checkpoint


def newest_checkpoint(folder: Path, fresh: bool) -> Path:
    """The newest intact checkpoint; incomplete and damaged ones are skipped with a warning.

    Args:
        folder: Folder of checkpoints.
        fresh: Whether a run without a checkpoint may use the run folder.

    Raises:
        InputError: There is none.
    """
    for path in reversed(checkpoints_in(folder)):
        if (fault := fault_of(path)) is None:
            return path
        logger.warning("%s is skipped: %s", path, fault)
    damaged = any(fault_of(path, hashes=False) is None for path in checkpoints_in(folder))
    instead = "train without --resume" if fresh else "train in another folder"
    if damaged:
        instead = f"all are damaged: {instead}"
    raise InputError(f"no complete checkpoint in {folder}; {instead}")


def _files(checkpoint: Path) -> dict[str, Path]:
    """Files of a checkpoint by their relative names, without list and mark."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return {path.relative_to(checkpoint).as_posix(): path for path in paths if path.name not in (SEAL, _MARK)}
