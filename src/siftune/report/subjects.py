"""The subjects of a report: runs, sifted pools and lists of rows, which may be untrusted."""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siftune.base.errors import InputError, RecipeError
from siftune.base.files import refuse_links
from siftune.base.json_files import read_json_lines, read_sealed
from siftune.base.text import finite, short_names
from siftune.base.work_folder import read_record
from siftune.recipe.read import load_recipe
from siftune.recipe.schema import Recipe
from siftune.report.evals import Eval, read_evals
from siftune.report.scored import DecisionList, Pool, by_bad_rows, by_target, read_list
from siftune.report.words import duration
from siftune.sifting.checks import RECORD as SIFT_RECORD
from siftune.sifting.sift import SCORES
from siftune.sifting.tuning import AVOID
from siftune.train.folder.run_folder import RECIPE, SIFT

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """A training run, finished or not."""

    path: Path
    name: str  # what it is called on the page: no other run there has the same name
    recipe: Recipe
    status: str  # what run.json says: finished, interrupted, stopped; or "running" where there is none yet
    summary: dict[str, float] = field(repr=False)  # figures of run.json
    followed: dict[str, float] = field(repr=False)  # share of the rows of each source that layers follow, from run.json
    about: dict[str, str] = field(repr=False)  # versions and hardware, name -> text
    metrics: list[dict[str, float]] = field(repr=False)  # lines of metrics.jsonl, figures alone
    evals: list[Eval] = field(repr=False)  # the newest last

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
class Sifting:
    """A folder of `siftune sift`.

    Attributes:
        path: The folder.
        name: Its name on the page.
        facts: Settings from its record, not checked.
        state: Results from its record, not checked.
        pool: The pool by the scores of a target; None without one.
        bad: The pool by the scores of bad rows; None without them.
    """

    path: Path
    name: str
    facts: dict[str, Any] = field(repr=False)
    state: dict[str, Any] = field(repr=False)
    pool: Pool | None = field(repr=False)
    bad: Pool | None = field(repr=False)

    @property
    def decisions(self) -> Pool:
        """The pool whose file states which rows are selected."""
        pool = self.pool or self.bad
        assert pool is not None
        return pool


@dataclass(frozen=True)
class Subjects:
    """All that a page is about."""

    runs: tuple[RunData, ...] = ()  # runs, in the order in which they were named
    siftings: tuple[Sifting, ...] = ()
    lists: tuple[tuple[str, DecisionList], ...] = ()  # decision files with their names


def find_subjects(names: Sequence[str]) -> Subjects:
    """Read what folders hold: runs, also of `siftune demo`, and sifted pools; and lists of rows.

    Args:
        names: Folders, and CSV files of rows.

    Raises:
        InputError: A folder or file is none of these, or damaged.
    """
    if not names:
        raise RecipeError("nothing to report on: give the folder of a run or of a sifted pool, or a list")
    paths = list(dict.fromkeys(path for name in names for path in _paths(name)))
    for path in paths:
        refuse_links(path)  # by which a command could write elsewhere
    called = dict(zip(paths, short_names(paths), strict=True))
    runs, siftings, lists = [], [], []
    for path, name in called.items():
        if path.is_file():
            lists.append((name, read_list(path)))
        elif (path / RECIPE).exists():
            runs.append(read_run(path, name))
        else:
            siftings.append(_sifting(path, name))
    return Subjects(tuple(runs), tuple(siftings), tuple(lists))


_DEMO = ("pool", "few", "target", "sifted")  # runs of a demo, in their order


def _paths(name: str) -> list[Path]:
    """The list or folder of that name, or all runs and sifted pools in it, by name."""
    path = Path(name).expanduser()
    is_list = path.is_file() and path.suffix.lower() == ".csv"
    if is_list or _is_subject(path) or (path / SIFT_RECORD).exists():
        return [path]
    inside = [each for each in path.iterdir() if _is_subject(each)] if path.is_dir() else []
    if inside:
        order = [*_DEMO, *sorted({each.name for each in inside} - {*_DEMO})]
        return sorted(inside, key=lambda each: order.index(each.name))
    state = "it has no run or sifted pool" if path.is_dir() else "it is no folder and no CSV file"
    raise RecipeError(
        f"nothing to report on in {name}: {state if path.exists() else 'there is none of that name'}; give a folder of "
        "siftune train, sift or demo, or a CSV file of siftune rows"
    )


def _is_subject(path: Path) -> bool:
    """Whether a folder is one of these; a pool that is not sifted to the end is none."""
    is_sifted = (path / SIFT_RECORD).exists() and any((path / name / SCORES).is_file() for name in ("", AVOID))
    return is_sifted or (path / RECIPE).exists()


def read_run(path: Path, name: str) -> RunData:
    """Read a run folder; the run may still be under way.

    Raises:
        InputError: A file in it is damaged; the message names it.
    """
    about = path / "run.json"
    record = read_sealed(about, dict[str, Any], "restore it, or leave the folder out") if about.exists() else {}
    summary = record.get("summary")
    summary = summary if isinstance(summary, dict) else {}
    figures, followed = _figures(summary), summary.get("followed")
    if "seconds" in figures:
        figures["seconds"] += _sifting_seconds(path / SIFT / SIFT_RECORD)
    return RunData(
        path=path,
        name=name,
        recipe=load_recipe(path / RECIPE),
        status=str(record.get("status", "running")),
        summary=figures,
        followed=_figures(followed) if isinstance(followed, dict) else {},
        about=_about(record),
        metrics=_metrics(path / "metrics.jsonl"),
        evals=read_evals(path),
    )


def _sifting_seconds(path: Path) -> float:
    """Time that a run's pool was sifted for; 0 without sifting, or if its record cannot be read."""
    try:
        return finite(read_record(path).state["seconds"])
    except (InputError, KeyError, TypeError, ValueError, OverflowError):
        return 0.0


def _about(record: dict[str, Any]) -> dict[str, str]:
    """Hardware and versions."""
    versions = record.get("versions")
    pairs = {str(name): str(number) for name, number in versions.items()} if isinstance(versions, dict) else {}
    return {"hardware": str(record["hardware"]), **pairs} if "hardware" in record else pairs


def _metrics(path: Path) -> list[dict[str, float]]:
    """Figures of every line."""
    lines, damaged = read_json_lines(path, dict[str, Any])
    if damaged:  # the last line of a run that is under way may be half written
        logger.warning("%s: damaged lines are left out: %d", path, damaged)
    return [_figures(line) for line in lines]


def _figures(record: dict[str, Any]) -> dict[str, float]:
    """What of a record is a figure."""
    figures = {}
    for name, value in record.items():
        if isinstance(value, int | float):
            with contextlib.suppress(ValueError, OverflowError):
                figures[name] = finite(value)
    return figures


def _sifting(path: Path, name: str) -> Sifting:
    record = read_record(path / SIFT_RECORD)
    pool, bad = by_target(path, record.state), by_bad_rows(path)
    if (pool or bad) is None:
        raise InputError(f"{path} has no scores yet: run the same command of siftune sift again, which continues")
    return Sifting(path, name, record.facts, record.state, pool, bad)
