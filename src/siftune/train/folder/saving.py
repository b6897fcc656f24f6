"""Callbacks that complete the Trainer's checkpoints: their seal, and the identity of what is trained."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from siftune.base.files import write_beside
from siftune.base.ranks import wait_for_all
from siftune.train.folder.checkpoints import SOURCE, seal


class Sealing(TrainerCallback):  # type: ignore[misc]
    """Seals a checkpoint once every other callback has written its part, then deletes older ones.

    It must be the last callback.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """List the files."""
        wait_for_all()  # every rank writes the state of its generators
        if args.should_save:
            seal(checkpoint_of(args, state))
            rotate_checkpoints(args.output_dir, args.save_total_limit, state.best_model_checkpoint, use_mtime=True)


class SourceNote(TrainerCallback):  # type: ignore[misc]
    """Adds the identity of what is trained to every checkpoint, so that a run does not resume on something else.

    Args:
        identity: Hashes by name, as of `train.source.Source`.
    """

    def __init__(self, identity: Mapping[str, str]) -> None:
        self._identity = dict(identity)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write it."""
        if args.should_save and self._identity:
            with write_beside(checkpoint_of(args, state) / SOURCE) as [beside]:
                beside.write_text(json.dumps(self._identity) + "\n", encoding="utf-8")


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """Folder of the checkpoint of this step."""
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
