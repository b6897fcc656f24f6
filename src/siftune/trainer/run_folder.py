"""The folder that a training run leaves behind.

    RUN/
      recipe.yaml       every setting, resolved
      run.json          status, versions, hardware, summary
      metrics.jsonl     one line per log: step, loss, learning rate, tokens per second, peak memory
      selection.jsonl   one line per step: the layers that trained; scores where they were taken
      adapter/          the adapter in PEFT's format, or the layers that were tuned themselves; and the tokenizer
      return/           of a run on a kit: what goes back to the model's owner
      checkpoints/      the Trainer's checkpoints, for --resume
      README.md         model card

Single files are written beside their place and moved into it, so that a full disk leaves the old one intact.
"""

import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from siftune.errors import InputError, RecipeError

_PACKAGES = ("siftune", "torch", "transformers", "peft", "accelerate", "datasets")


class RunFolder:
    """Paths and writers of one run's folder.

    Args:
        path: The folder; made if it is missing.

    Raises:
        RecipeError: When the folder cannot be made or written to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_text("")
            probe.unlink()
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

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line to a .jsonl file."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a text file in one move."""
        beside = self.path / f".{name}.partial"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.path / name)

    def write_run(self, **values: Any) -> None:
        """Write run.json: what is given here, versions and hardware."""
        record = {**values, "versions": versions(), "hardware": hardware()}
        self.write("run.json", json.dumps(record, indent=2) + "\n")

    def replace(self, parts: Mapping[str, Callable[[Path], None]]) -> None:
        """Have subfolders written anew: all of them beside their places, and only then are they moved there.

        Args:
            parts: Name of a subfolder -> what writes it to the path that it is given.
        """
        beside = {name: self.path / f".{name}.partial" for name in parts}
        for path in beside.values():
            shutil.rmtree(path, ignore_errors=True)
        try:
            for name, save in parts.items():
                save(beside[name])
        except BaseException:
            for path in beside.values():
                shutil.rmtree(path, ignore_errors=True)  # half an adapter, on what may be a full disk
            raise
        for name, path in beside.items():
            if (self.path / name).exists():
                shutil.rmtree(self.path / name)
            os.replace(path, self.path / name)

    def cut_records(self, step: int) -> None:
        """Drop metrics and selections after `step`, which a resumed run will write again."""
        for name, first_dropped in (("metrics.jsonl", step + 1), ("selection.jsonl", step)):
            path = self.path / name
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if _step(line) < first_dropped]
                self.write(name, "".join(line + "\n" for line in kept))

    def drop_half_written(self) -> None:
        """Remove checkpoints that are not complete: on a full disk the adapter needs their place."""
        for path in _checkpoints(self.checkpoints):
            if not is_complete(path):
                shutil.rmtree(path, ignore_errors=True)

    def is_fresh(self) -> bool:
        """Whether no run has left anything here that was trained."""
        left = self.adapter.exists() or self.returned.exists()
        return not left and not any(self.checkpoints.glob("checkpoint-*"))


def newest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint in `folder`; a half-written one, as after a full disk, is passed over.

    Raises:
        InputError: When there is none.
    """
    for path in reversed(_checkpoints(folder)):
        if is_complete(path):
            return path
    raise InputError(f"No complete checkpoint in {folder}; train without --resume, and with --save-every.")


def _checkpoints(folder: Path) -> list[Path]:
    """Folders of checkpoints in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _step(line: str) -> float:
    """Step of a record; infinite for a line that a crash has cut off."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return math.inf


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has its state, which the Trainer writes last, and its weights."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(checkpoint.glob("*.safetensors"))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> str:
    """The machine in words: its accelerator, or its processor and the threads in use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"
