"""The folder of a learning-rate sweep.

FOLDER/
start.json      the base model's held-out loss, and digests of the rows
METHOD.yaml     the recipe of each method, for `siftune train`; its `lr` is the recipe's, not the best
results.jsonl   a line per run, as it ends
results.json, results.md, results.png   what `siftune.report.lr` makes of them
"""

import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from siftune.base.errors import RecipeError
from siftune.base.files import write_beside
from siftune.base.jsonable import parsed
from siftune.methods import METHODS
from siftune.recipe.read import load_recipe, recipe_to_yaml
from siftune.recipe.schema import Recipe
from siftune.train.folder.run import RunFolder
from siftune.train.rates.grid import LRRun, difference

logger = logging.getLogger(__name__)

_START, _RESULTS = "start.json", "results.jsonl"


class LRFolder:
    """Paths, readers and writers of a sweep's folder, which is made if it is missing.

    Raises:
        RecipeError: It cannot be written to, holds something else, or its start.json is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        place = Path(path)
        if place.is_dir() and any(place.iterdir()) and not (place / _START).exists():
            raise RecipeError(f"{place} is not empty and holds no sweep of learning rates; give another with --out.")
        self._folder = RunFolder(place)
        self.path = place
        self._start = self._read_start()

    @property
    def base_loss(self) -> float:
        """Held-out loss of the base model, in nats per label token; to be asked for after `begin`."""
        assert self._start is not None
        return float(self._start["heldout_loss"])

    @property
    def begun(self) -> bool:
        """Whether the base model has been measured."""
        return self._start is not None

    def taken_back(self) -> AbstractContextManager[None]:
        """Leave no folder behind where the block fails before anything is in it."""
        return self._folder.taken_back()

    def refuse_others(self, recipes: Mapping[str, Recipe]) -> None:
        """Refuse recipes, resolved, by method, that would not train as the sweep in this folder did.

        Raises:
            RecipeError: They differ; the message names the setting.
        """
        for method in filter(self.has, METHODS):
            before: Recipe = load_recipe(self._recipe(method))
            now = recipes.get(before.method) or next(iter(recipes.values()))
            found = difference(before, now)
            if found is not None:
                name, old, new = found
                raise RecipeError(
                    f"{self.path} holds a sweep with {name} = {old}, but now {name} is {new}: set {name} as it was, "
                    "or give another folder with --out."
                )

    def refuse_other_rows(self, digests: Mapping[str, str]) -> None:
        """Refuse rows, by their digests, that are not those of the sweep in this folder.

        Raises:
            RecipeError: They differ; the message names which.
        """
        known: dict[str, str] = self._start["rows"] if self._start else {}
        for name, digest in known.items():
            if digests.get(name, digest) != digest:
                raise RecipeError(
                    f"the {name} rows are not those that the sweep in {self.path} was made with: bring these back, "
                    "or give another folder with --out."
                )

    def begin(self, heldout_loss: float, digests: Mapping[str, str]) -> None:
        """Write start.json; digests that are there already stay."""
        known = self._start["rows"] if self._start else {}
        self._start = {"heldout_loss": heldout_loss, "rows": {**known, **digests}}
        self._folder.write(_START, json.dumps(self._start, indent=2) + "\n")

    def has(self, method: str) -> bool:
        """Whether a method is known to run with the sweep's recipe."""
        return self._recipe(method).exists()

    def add(self, recipe: Recipe) -> None:
        """Write the recipe of a method that is known to run."""
        self._folder.write(f"{recipe.method}.yaml", recipe_to_yaml(recipe))

    def append(self, run: LRRun) -> None:
        """Add a run to results.jsonl."""
        self._folder.append(_RESULTS, asdict(run))

    def runs(self) -> list[LRRun]:
        """The runs so far, in the order in which they ended; of two in one cell the later.

        A line that a crash has cut off is dropped, in the file as well: the next one would be appended to it.
        """
        path = self.path / _RESULTS
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        read = [_run(line) for line in text.splitlines()]
        runs = [run for run in read if run is not None]
        if len(runs) < len(read) or (text and not text.endswith("\n")):
            logger.warning("%s: %d damaged lines are dropped", path, len(read) - len(runs))
            self._folder.write(_RESULTS, "".join(json.dumps(asdict(run)) + "\n" for run in runs))
        return list({run.cell: run for run in runs}.values())

    def write_report(self, texts: Mapping[str, str], picture: bytes) -> None:
        """Write a report: name of a file -> its text, and results.png."""
        for name, text in texts.items():
            self._folder.write(name, text)
        with write_beside(self.path / "results.png") as [beside]:
            beside.write_bytes(picture)

    def _recipe(self, method: str) -> Path:
        return self.path / f"{method}.yaml"

    def _read_start(self) -> dict[str, Any] | None:
        path = self.path / _START
        if not path.exists():
            return None
        try:
            start = parsed(path.read_text(encoding="utf-8"))
            return {"heldout_loss": float(start["heldout_loss"]), "rows": dict(start["rows"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{path} can't be read ({error}); give another folder with --out.") from error


def _run(line: str) -> LRRun | None:
    """Read a line of results.jsonl; None for one that is damaged."""
    try:
        return LRRun(**parsed(line))
    except (ValueError, TypeError):
        return None
