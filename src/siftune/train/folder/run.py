"""The folder that a training run leaves behind.

    RUN/
      recipe.yaml         every setting, resolved
      run.json            status, versions, hardware, summary
      rows.sha256         what tells its training rows from others
      bad_rows.txt        rows that were left out, and why, where there were any
      metrics.jsonl       one line per log: step, loss, learning rate, tokens per second, peak memory
      rows.parquet        one line per row and visit: its loss, and what methods made of it; for siftune rows
      selections.parquet  one line per choice of layers or rows: see selections.py
      eval.json           what siftune eval found, with answers: see report/evals.py
      adapter/            the adapter in PEFT's format, or the layers that were tuned themselves; and the tokenizer
      return/             of a run on a kit: what goes back to the model's owner
      checkpoints/        the Trainer's checkpoints, for --resume
      README.md           model card

Single files are written beside their place and moved into it, so that a full disk leaves the old one intact.
"""

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from siftune.base.environment import hardware, versions
from siftune.base.errors import InputError, RecipeError
from siftune.base.files import writable_folder, write_beside
from siftune.base.jsonable import parsed
from siftune.records.rows import BAD_ROWS
from siftune.train.folder.checkpoints import (
    checkpoints_in,
    fault_of,
    step_of,
    whole_checkpoints,
)
from siftune.train.folder.selections import SELECTIONS

RECIPE, ROWS = "recipe.yaml", "rows.sha256"
METRICS = "metrics.jsonl"
logger = logging.getLogger(__name__)


class RunFolder:
    """Paths and writers of one run's folder, which is made if it is missing.

    Raises:
        RecipeError: When the folder cannot be made or written to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]  # the deepest first
        self._found = {place.name for place in self.path.iterdir()} if self.path.is_dir() else set()
        try:
            writable_folder(self.path)
        except OSError as error:
            raise RecipeError(
                f"The run folder {self.path} cannot be written to ({error.strerror}); give another with --out."
            ) from error

    @property
    def adapter(self) -> Path:
        """Folder of the adapter."""
        return self.path / "adapter"

    @property
    def returned(self) -> Path:
        """Folder of what goes back to the owner of a kit."""
        return self.path / "return"

    @property
    def checkpoints(self) -> Path:
        """Folder of the Trainer's checkpoints."""
        return self.path / "checkpoints"

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line to a .jsonl file."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a text file in one move."""
        with write_beside(self.path / name) as [beside]:
            beside.write_text(text, encoding="utf-8")

    def write_run(self, **values: Any) -> None:
        """Write run.json: what is given here, versions and hardware."""
        record = {**values, "versions": versions(), "hardware": hardware()}
        self.write("run.json", json.dumps(record, indent=2) + "\n")

    def replace(self, parts: Mapping[str, Callable[[Path], None]]) -> None:
        """Have subfolders, by name, written anew: all beside their places, and only then are they moved there."""
        with write_beside(*(self.path / name for name in parts)) as beside:
            for save, path in zip(parts.values(), beside, strict=True):
                save(path)

    def cut_records(self, step: int) -> None:
        """Drop metrics after `step`, which a resumed run will write again."""
        path = self.path / METRICS
        if path.exists():
            try:
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error.strerror}); put it away to go on") from error
            self.write(METRICS, "".join(line + "\n" for line in lines if _step(line) <= step))

    def drop_half_written(self) -> None:
        """Remove checkpoints that are not complete: on a full disk the adapter needs their place."""
        for path in checkpoints_in(self.checkpoints):
            if fault_of(path, hashes=False):
                shutil.rmtree(path, ignore_errors=True)

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return any(True for _ in whole_checkpoints(self.checkpoints))

    def has_left(self, checkpoint: Path) -> bool:
        """Whether what was trained up to a checkpoint has been left: not where a run was killed just before."""
        if checkpoint.absolute().parent != self.checkpoints.absolute():
            return True  # of another run
        try:
            record = parsed((self.path / "run.json").read_text(encoding="utf-8"))
            return bool(record["status"] == "finished" and record["summary"]["steps"] >= step_of(checkpoint))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def is_fresh(self) -> bool:
        """Whether no run has left anything here that was trained."""
        left = self.adapter.exists() or self.returned.exists()
        return not left and all(fault_of(path, hashes=False) for path in checkpoints_in(self.checkpoints))

    def holds_other(self) -> str | None:
        """What was in the folder before that is no run's, and would be written over or mixed with it; None: nothing."""
        if {RECIPE, "run.json"} & self._found:
            return None
        models = ("config.json", "adapter_config.json", "emulator.safetensors")
        return next((name for name in (*models, "README.md") if name in self._found), None)

    @contextlib.contextmanager
    def taken_back(self) -> Iterator[None]:
        """Leave no file and no new folder behind where the block fails before anything was learned."""
        try:
            yield
        except BaseException:
            if self.is_fresh() and not (self.path / METRICS).exists():
                self._take_back()
            raise

    def _take_back(self) -> None:
        for name in {RECIPE, ROWS, BAD_ROWS, SELECTIONS} - self._found:
            (self.path / name).unlink(missing_ok=True)
        if self.checkpoints.name not in self._found:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        for folder in self._made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                folder.rmdir()


def _step(line: str) -> float:
    """Step of a record; infinite for a line that a crash has cut off, or that is none."""
    try:
        return float(parsed(line)["step"])
    except (ValueError, TypeError, LookupError):
        return math.inf
