"""Offsite-tuning's tables in a folder: kits, tuned outer layers, and the answers of each model.

For each task: the base model untuned, and with its outer layers tuned; for each emulator: untuned, tuned, and
the base with the layers that were tuned on the emulator plugged in.

OUT/
  protocol.json                 what the folder is of; another call must be of the same
  data/                         the rows: see `harness_rows.py`
  kits/EMULATOR/                as `siftune emulate` leaves it
  rates/TASK-EMULATOR/          a sweep of learning rates; TASK-base for the base model
  runs/TASK-EMULATOR-seed0/     a run folder on the kit, with the return; TASK-base-seed0 for the base model
  answers/PLACE/TASK.json       PLACE: base, EMULATOR; and tuned-seed0, EMULATOR-tuned-seed0, EMULATOR-plugged-seed0
  table.md, results.json
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lab.reproduce.answers import Answers, Asking
from lab.reproduce.harness_rows import CALIBRATION, prepare_tasks
from lab.reproduce.protocol import Protocol
from lab.reproduce.steps import ask_all, begin, rate_of, refuse_other_rate, run_once, swept
from lab.reproduce.table import Line
from siftune.base.files import Progress
from siftune.cli.subjects import find_subject, load_subject
from siftune.data.read import load_rows
from siftune.data.tokens import tokenize_rows
from siftune.models.load import load_model
from siftune.offsite.emulator.model import Split
from siftune.offsite.emulator.plan import EmulatorSettings
from siftune.offsite.exchange.calibration import in_batches
from siftune.offsite.exchange.emulate import KitOptions, emulate
from siftune.offsite.exchange.plug import plug_in
from siftune.offsite.exchange.returned import open_return
from siftune.offsite.exchange.tune import source_of
from siftune.offsite.kit.folder import is_kit, read_kit
from siftune.recipe.schema import Recipe
from siftune.train.rates.grid import Grid, recipes_of

SPLIT = Split()
BASE, METHOD = "base", "dense"
_LENGTH, _BATCH = 128, 4  # ours: of calibration rows, as `siftune emulate` has them


@dataclass(frozen=True)
class Offsite:
    """An offsite-tuning protocol at work in a folder.

    Attributes:
        protocol: The protocol.
        tasks: Its tasks that are used.
        grid: Learning rates to try, and seeds; all runs are dense.
        emulators: Names of the emulators, of `Suite.emulators`.
        keep: Fraction of the middle's parameters that a kit holds.
        out: The folder.
        asking: How questions are asked.
        sweep_steps: Steps of each run of a sweep; None: as many as a run has.
    """

    protocol: Protocol
    tasks: tuple[str, ...]
    grid: Grid
    emulators: tuple[str, ...]
    keep: float
    out: Path
    asking: Asking
    sweep_steps: int | None = None

    @property
    def reference(self) -> str:
        """What the last column of the tables takes off."""
        return BASE

    def lines(self) -> list[Line]:
        """Lines of the tables; differences are to the untuned base model."""
        seeds = self.grid.seeds
        lines = [self._line(BASE, [BASE]), self._line("base, outer layers tuned", [f"tuned-seed{s}" for s in seeds])]
        for name in self.emulators:
            lines.append(self._line(name, [name]))
            for what in ("tuned", "plugged"):
                label = f"{name}, {what}{' in' if what == 'plugged' else ''}"
                lines.append(self._line(label, [f"{name}-{what}-seed{s}" for s in seeds]))
        return lines

    def _line(self, label: str, places: Sequence[str]) -> Line:
        seeds = [{task: self._answers(place, task) for task in self.tasks} for place in places]
        return Line(label, seeds, None if label == BASE else BASE)

    def rates(self) -> dict[str, float]:
        """The learning rate of each task's tunings that have finished."""
        subjects = [(task, name) for task in self.tasks for name in (BASE, *self.emulators)]
        found = {f"{task} on {name}": rate_of(self._run(task, name, self.grid.seeds[0])) for task, name in subjects}
        return {label: rate for label, rate in found.items() if rate is not None}

    def begin(self, about: Mapping[str, Any]) -> None:
        """Note what the folder is of, or see that it is of the same.

        Args:
            about: What decides the results besides emulators, rates and seeds.

        Raises:
            RecipeError: It is of something else, or the recipe or a kept fraction cannot be used.
        """
        for task in self.tasks:
            recipes_of(self._recipe(task, BASE), [METHOD])
        for name in self.emulators:
            self._settings(name).check()
        begin(self.out, {**about, "keep": self.keep})

    def prepare(self, data: str, limit: int | None, questions: int | None) -> None:
        """Write the rows; see `harness_rows.prepare_tasks`."""
        prepare_tasks(self.protocol.suite, self.tasks, data, self.out / "data", limit, questions)

    def work(self, console: Console, progress: Progress) -> Iterator[str]:
        """Do what is missing, seed by seed and task by task, and name each part when all of it is there."""
        for name in self.emulators:
            self._make_kit(name, progress)
            yield f"kit {name}"
        for seed in self.grid.seeds:
            for task in self.tasks:
                self._tuned(task, BASE, seed, console, progress)
                for name in self.emulators:
                    self._tuned(task, name, seed, console, progress)
                    self._plugged(task, name, seed, progress)
                yield f"{task}, seed {seed}"

    def _make_kit(self, name: str, progress: Progress) -> None:
        folder = self.out / "kits" / name
        if is_kit(folder):
            return
        recipe = self.protocol.recipe
        model, tokenizer = load_model(recipe.model, recipe.dtype, streamed=True)
        rows = load_rows(str(self.out / "data" / CALIBRATION))
        table = tokenize_rows(rows, tokenizer, _LENGTH, recipe.template, completion_only=False)
        batches, options = in_batches(table, _BATCH, tokenizer.pad_token_id), KitOptions(model.dtype, torch.float32)
        emulate(model, tokenizer, batches, folder, self._settings(name), options, progress)

    def _settings(self, name: str) -> EmulatorSettings:
        how: Mapping[str, Any] = self.protocol.suite.emulators[name]
        return EmulatorSettings(keep=self.keep, split=SPLIT, **how)

    def _tuned(self, task: str, name: str, seed: int, console: Console, progress: Progress) -> None:
        """Tune the outer layers of the base or of an emulator, and ask it before and after."""
        recipe = self._recipe(task, name)
        self._ask(name, task, recipe.model, progress)
        grid = replace(self.grid, methods=(METHOD,), seeds=self.grid.seeds[:1])
        rates = swept(recipe, grid, self.out / "rates" / f"{task}-{name}", self.sweep_steps, progress, source_of)
        folder = self._run(task, name, seed)
        refuse_other_rate(folder, rates[METHOD])
        (resolved,) = recipes_of(recipe, [METHOD]).values()
        run_once(replace(resolved, lr=rates[METHOD], seed=seed), folder, console, source_of)
        place = f"tuned-seed{seed}" if name == BASE else f"{name}-tuned-seed{seed}"
        self._ask(place, task, str(folder), progress)

    def _plugged(self, task: str, name: str, seed: int, progress: Progress) -> None:
        """Ask the base with the layers that were tuned on an emulator."""

        def load() -> tuple[Any, Any]:
            model, tokenizer = load_subject(find_subject(self.protocol.recipe.model), self.protocol.recipe.dtype)
            kit = read_kit(self.out / "kits" / name)
            with open_return(self._run(task, name, seed) / "return", kit) as returned:
                plug_in(model, kit, [returned])
            return model, tokenizer

        self._asked(f"{name}-plugged-seed{seed}", task, load, progress)

    def _ask(self, place: str, task: str, subject: str, progress: Progress) -> None:
        dtype = self.protocol.recipe.dtype
        self._asked(place, task, lambda: load_subject(find_subject(subject), dtype), progress)

    def _asked(self, place: str, task: str, load: Any, progress: Progress) -> None:
        tasks = {task: (self.protocol.suite.tables[task], self._answers(place, task))}
        ask_all(load, tasks, self.out / "data", self.asking, progress)

    def _answers(self, place: str, task: str) -> Answers:
        return Answers(self.out / "answers" / place / f"{task}.json")

    def _run(self, task: str, name: str, seed: int) -> Path:
        return self.out / "runs" / f"{task}-{name}-seed{seed}"

    def _recipe(self, task: str, name: str) -> Recipe:
        """The recipe of a tuning, but for rate and seed."""
        data = self.out / "data"
        train, heldout = (str(data / f"{task}.{part}.jsonl") for part in ("train", "heldout"))
        recipe = replace(self.protocol.recipe, train=train, eval=heldout)
        if name != BASE:
            return replace(recipe, model=str(self.out / "kits" / name))
        return replace(recipe, layers=(*range(SPLIT.first), *range(-SPLIT.last, 0)))  # those that a kit has
