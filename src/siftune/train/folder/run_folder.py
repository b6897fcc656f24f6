"""Run folders: files, their writers, and the checks before a run begins.

    RUN/
      recipe.yaml         every setting, resolved
      run.json            status, versions, hardware, summary
      rows.sha256         hash of the tokenised training rows
      bad_rows.txt        rows that were left out and the reasons, if any
      drop_rows.csv       copy of the recipe's list of rows to leave out, if there is one
      metrics.jsonl       a line for each log: step, loss, learning rate, tokens per second, peak memory
      losses.parquet      a line for each row: its loss without training on it; see suspects/losses.py
      selections.parquet  a line for each choice of layers or rows; see selections.py
      eval.json           results of siftune eval
      adapter/            the adapter in PEFT's format, or the tuned layers, and the tokenizer
      return/             for the owner of a kit
      checkpoints/        the Trainer's checkpoints
      README.md           model card

Every file is written beside its place and moved there, so a full disk leaves the old one intact. Nothing here imports
torch, so that commands refuse a folder quickly.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from siftune.base.environment import hardware, versions
from siftune.base.errors import InputError, RecipeError
from siftune.base.files import hash_of, open_to_append, refuse_links, writable_folder, write_beside
from siftune.base.json_files import read_json_lines, read_sealed, sealed
from siftune.recipe.training_rows import BAD_ROWS
from siftune.train.folder.checkpoints import checkpoints_in, fault_of, step_of, whole_checkpoints

RECIPE, ROWS, METRICS, SELECTIONS = "recipe.yaml", "rows.sha256", "metrics.jsonl", "selections.parquet"
LOSSES, EVALS = "losses.parquet", "eval.json"
HALVES = "halves"  # folder of a scoring of rows that was interrupted
SIFT = "sift"  # folder of a pool that was sifted before the run


class _Summary(BaseModel):
    steps: int


class _About(BaseModel):
    """Fields of run.json that decide whether a run has finished."""

    status: str
    summary: _Summary


class _Weights(BaseModel):
    weights: dict[str, str] = {}


class RunFolder:
    """A run folder.

    Args:
        path: The folder.
        create: Whether to create it if it is missing, and to try a write; False: only look at it.

    Raises:
        InputError: It holds a link, which could lead a write of the run to a file elsewhere.
        RecipeError: It cannot be created or written to.
    """

    def __init__(self, path: str | Path, create: bool = True) -> None:
        self.path = Path(path)
        refuse_links(self.path)  # the folder may come from another party
        self._created = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]  # deepest first
        self._before = {place.name for place in self.path.iterdir()} if self.path.is_dir() else set()
        self.adapter, self.returned = self.path / "adapter", self.path / "return"
        self.checkpoints = self.path / "checkpoints"
        try:
            if create:
                writable_folder(self.path)
        except OSError as error:
            raise RecipeError(
                f"the run folder {self.path} cannot be written to ({error.strerror}); give another with --out"
            ) from error

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line to a .jsonl file."""
        with open_to_append(self.path / name) as file:
            file.write(json.dumps(record) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a text file in one move."""
        with write_beside(self.path / name) as [beside]:
            beside.write_text(text, encoding="utf-8")

    def write_lines(self, name: str, lines: Sequence[str]) -> None:
        """Write a text file of lines; without lines, remove the file of an earlier run."""
        if lines:
            self.write(name, "".join(f"{line}\n" for line in lines))
        else:
            (self.path / name).unlink(missing_ok=True)

    def write_run(self, **values: Any) -> None:
        """Write run.json: values, versions and hardware."""
        record = {**values, "versions": versions(), "hardware": hardware()}
        self.write("run.json", json.dumps(sealed(record), indent=2) + "\n")

    def replace(self, parts: Mapping[str, Callable[[Path], None]]) -> None:
        """Write subfolders, by name, beside their places, then move all of them."""
        with write_beside(*(self.path / name for name in parts)) as beside:
            for save, path in zip(parts.values(), beside, strict=True):
                save(path)

    def cut_records(self, step: int) -> None:
        """Drop metrics after `step`, which a resumed run writes again."""
        lines, _ = read_json_lines(self.path / METRICS, dict[str, Any], "move it elsewhere to continue")
        earlier = [line for line in lines if _is_step(line.get("step")) and line["step"] <= step]
        self.write_lines(METRICS, [*map(json.dumps, earlier)])

    def drop_half_written(self) -> None:
        """Remove incomplete checkpoints: on a full disk the adapter needs their space."""
        for path in checkpoints_in(self.checkpoints):
            if fault_of(path, hashes=False):
                shutil.rmtree(path, ignore_errors=True)

    def has_checkpoint(self) -> bool:
        """Whether there is a complete checkpoint."""
        return any(True for _ in whole_checkpoints(self.checkpoints))

    def has_results(self, checkpoint: Path) -> bool:
        """Whether the results of the steps up to a checkpoint are written; always true in another run's folder."""
        return checkpoint.absolute().parent != self.checkpoints.absolute() or self.has_finished(step_of(checkpoint))

    def has_finished(self, steps: int = 0) -> bool:
        """Whether a run of at least these steps has finished, with its results."""
        try:
            about = read_sealed(self.path / "run.json", _About)
        except InputError:
            return False
        return about.status == "finished" and about.summary.steps >= steps

    def weights(self) -> dict[str, str]:
        """SHA-256 of each file of the trained weights, by name; of the card none, which is text for people."""
        files = (path for path in sorted(self.adapter.glob("*")) if path.is_file() and path.name != "README.md")
        return {path.name: hash_of(path) for path in files}

    def changed_weights(self) -> list[str]:
        """Names of the files of trained weights that are not what the run wrote; none if run.json does not tell."""
        try:
            before = read_sealed(self.path / "run.json", _Weights).weights
        except InputError:
            return []
        now = self.weights() if before else {}
        return [name for name, digest in before.items() if now.get(name) != digest]

    def is_fresh(self) -> bool:
        """Whether the folder has neither results nor complete checkpoints."""
        results = self.adapter.exists() or self.returned.exists()
        return not results and all(fault_of(path, hashes=False) for path in checkpoints_in(self.checkpoints))

    def holds_other(self) -> str | None:
        """Name of a file that shows that the folder was not a run's; None for a run folder or an empty one."""
        if {RECIPE, "run.json"} & self._before:
            return None
        own = (ROWS, METRICS, BAD_ROWS, SELECTIONS, SIFT, self.adapter.name, self.returned.name)
        others = sorted(self._before - {*own, self.checkpoints.name})
        return next((name for name in others if not name.endswith(".partial")), None)

    def refuse_results(self, resume: bool) -> None:
        """Refuse a folder that was not a run's, or one of another run unless it is resumed.

        Raises:
            RecipeError: The folder is refused.
        """
        if (other := self.holds_other()) is not None:
            raise RecipeError(f"{self.path} is no run folder, since {other} is in it; give another folder with --out")
        if not resume and not self.is_fresh():
            raise RecipeError(
                f"{self.path} holds a run already; give another folder with --out, or resume it with --resume"
            )

    @contextlib.contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """Remove new files and folders if the block fails before the first log line or checkpoint."""
        try:
            yield
        except BaseException:
            if self.is_fresh() and not (self.path / METRICS).exists():
                for name in {RECIPE, ROWS, BAD_ROWS, SELECTIONS} - self._before:
                    (self.path / name).unlink(missing_ok=True)
                if self.checkpoints.name not in self._before:
                    shutil.rmtree(self.checkpoints, ignore_errors=True)
                for folder in self._created:
                    with contextlib.suppress(OSError):  # not empty: another process uses it
                        folder.rmdir()
            raise


def _is_step(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
