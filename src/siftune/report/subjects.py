"""The subjects of a report: runs and sweeps of learning rates, from folders that may be untrusted."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from siftune.base.errors import InputError, RecipeError
from siftune.base.files import refuse_links
from siftune.base.text import finite, parsed, short_names
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe
from siftune.report.evals import Eval, read_evals
from siftune.report.words import duration
from siftune.sifting.run import RECORD as SIFT_RECORD
from siftune.train.folder.run import RECIPE, SIFT
from siftune.train.folder.selections import LayersOfStep, RowsOfBatch, read_selections

# what fails in a file that holds something else than it ought to
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError)

_SWEEP = "start.json"  # file that marks the folder of a sweep of learning rates


@dataclass(frozen=True)
class RunData:
    """A training run, finished or not."""

    path: Path
    name: str  # what it is called on the page: no other run there has the same name
    recipe: Recipe
    status: str  # what run.json says: finished, interrupted, stopped; or "running" where there is none yet
    summary: dict[str, float] = field(repr=False)  # figures of run.json
    about: dict[str, str] = field(repr=False)  # versions and hardware, name -> text
    metrics: list[dict[str, float]] = field(repr=False)  # lines of metrics.jsonl, figures alone
    evals: list[Eval] = field(repr=False)  # the newest last

    @cached_property
    def selection(self) -> list[LayersOfStep | RowsOfBatch]:
        """What every step chose."""
        return list(read_selections(self.path))

    @property
    def layers(self) -> list[LayersOfStep]:
        """The layers of every step, where layers were chosen."""
        return [one for one in self.selection if isinstance(one, LayersOfStep)]

    @property
    def batches(self) -> list[RowsOfBatch]:
        """The rows of every batch, where rows were chosen."""
        return [one for one in self.selection if isinstance(one, RowsOfBatch)]

    def figure(self, name: str) -> float | None:
        """A figure of the summary; None where there is none."""
        return self.summary.get(name)

    @property
    def time(self) -> str:
        """Time of its training, as text; of a resumed run since then."""
        since = self.figure("resumed_step")
        return f"{duration(self.figure('seconds'))}{'' if since is None else f', after step {since:,.0f}'}"

    def course(self, name: str) -> tuple[list[float], list[float]]:
        """Steps at which a figure was logged, and the figure."""
        lines = [line for line in self.metrics if name in line and "step" in line]
        return [line["step"] for line in lines], [line[name] for line in lines]

    def sources(self, key: str) -> list[str]:
        """Sources of the losses that were logged under a key, such as "loss/"."""
        return sorted({name.removeprefix(key) for line in self.metrics for name in line if name.startswith(key)})


@dataclass(frozen=True)
class Sweep:
    """A sweep of learning rates."""

    path: Path
    name: str  # what it is called on the page
    record: dict[str, Any]  # of `start.json`, and `runs`, the lines of `results.jsonl`; not checked


@dataclass(frozen=True)
class Subjects:
    """All that a page is about."""

    runs: tuple[RunData, ...] = ()  # runs, in the order in which they were named
    sweeps: tuple[Sweep, ...] = ()


def find_subjects(names: Sequence[str]) -> Subjects:
    """Read what folders hold: runs, also of `siftune demo`, and sweeps of learning rates.

    Raises:
        InputError: A folder is none of these, or damaged.
    """
    if not names:
        raise RecipeError("nothing to report on: give the folder of a run or of a sweep of learning rates")
    folders = list(dict.fromkeys(path for name in names for path in _folders(name)))
    for folder in folders:
        refuse_links(folder)  # of another party, it could have any file shown
    called = dict(zip(folders, short_names(folders), strict=True))
    runs = tuple(read_run(path, name) for path, name in called.items() if (path / RECIPE).is_file())
    sweeps = tuple(_sweep(path, name) for path, name in called.items() if not (path / RECIPE).is_file())
    return Subjects(runs, sweeps)


_DEMO = ("pool", "few", "target", "sifted")  # runs of a demo, in their order


def _folders(name: str) -> list[Path]:
    """The folder of that name, or all runs and sweeps in it, by name."""
    path = Path(name).expanduser()
    if _holds_subject(path):
        return [path]
    inside = [each for each in path.iterdir() if _holds_subject(each)] if path.is_dir() else []
    if inside:
        order = [*_DEMO, *sorted({each.name for each in inside} - {*_DEMO})]
        return sorted(inside, key=lambda each: order.index(each.name))
    state = "there is no folder of that name" if not path.is_dir() else "it holds no run and no sweep of learning rates"
    raise RecipeError(f"nothing to report on in {name}: {state}; give a folder of siftune train, demo or find-lr")


def _holds_subject(path: Path) -> bool:
    return any((path / name).is_file() for name in (RECIPE, _SWEEP))


def read_run(path: Path, name: str) -> RunData:
    """Read a run folder; the run may still be under way.

    Raises:
        InputError: A file in it is damaged; the message names it.
    """
    record = _json(path / "run.json") if (path / "run.json").is_file() else {}
    summary = record.get("summary")
    figures = _figures(summary if isinstance(summary, dict) else {})
    if "seconds" in figures:
        figures["seconds"] += _sifting_seconds(path / SIFT / SIFT_RECORD)
    return RunData(
        path=path,
        name=name,
        recipe=load_recipe(path / RECIPE),
        status=str(record.get("status", "running")),
        summary=figures,
        about=_about(record),
        metrics=_metrics(path / "metrics.jsonl"),
        evals=read_evals(path),
    )


def _sifting_seconds(path: Path) -> float:
    """Time that a run's pool was sifted for; 0 without sifting, or if its record cannot be read."""
    try:
        return finite(parsed(path.read_text(encoding="utf-8"))["state"]["seconds"])
    except (OSError, *UNREADABLE):
        return 0.0


def _about(record: dict[str, Any]) -> dict[str, str]:
    """Hardware and versions."""
    versions = record.get("versions")
    pairs = {str(name): str(number) for name, number in versions.items()} if isinstance(versions, dict) else {}
    return {"hardware": str(record["hardware"]), **pairs} if "hardware" in record else pairs


def _metrics(path: Path) -> list[dict[str, float]]:
    """Figures of every line."""
    return [_figures(record if isinstance(record, dict) else {}) for record in _lines(path)]


def _lines(path: Path) -> list[Any]:
    """What every line holds; the last one may be half written."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(parsed(line))
        except ValueError:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number} is no JSON: mend or remove the line") from None
    return records


def _figures(record: dict[str, Any]) -> dict[str, float]:
    """What of a record is a figure."""
    figures = {}
    for name, value in record.items():
        if isinstance(value, int | float):
            with contextlib.suppress(ValueError, OverflowError):
                figures[name] = finite(value)
    return figures


def _sweep(path: Path, name: str) -> Sweep:
    return Sweep(path, name, _json(path / _SWEEP) | {"runs": _lines(path / "results.jsonl")})


def _json(path: Path) -> dict[str, Any]:
    try:
        record = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read ({error}): write it again, or leave the folder out") from error
    if not isinstance(record, dict):
        raise InputError(f"{path} holds no JSON object: write it again, or leave the folder out")
    return record
