"""The page of `siftune report`: from names of folders to one file, or the output of a notebook cell."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from siftune import __version__
from siftune.base.errors import RecipeError
from siftune.base.files import write_beside
from siftune.report.choices import selection
from siftune.report.compare import compare_runs, headline
from siftune.report.parts import TEMPLATES, Section, distinct, marked_up
from siftune.report.review import review_of_list, review_of_pool
from siftune.report.run_page import results, setup, suspects, training
from siftune.report.sifted import left_out, of_pool, of_run
from siftune.report.subjects import Subjects, find_subjects
from siftune.report.words import memory, short

_OF_A_RUN = (left_out, selection)
_STYLES = ("theme.css", "figure.css", "page.css", "review.css")


@dataclass(frozen=True)
class Page:
    """A report; the last line of a notebook's cell shows it.

    Attributes:
        html: The page, complete.
    """

    html: str

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that its styles stay there and its script reaches nothing else."""
        return (
            f'<iframe srcdoc="{escape(self.html)}" sandbox="allow-scripts allow-downloads" title="siftune report" '
            'style="width: 100%; height: 80vh; border: 1px solid #8884"></iframe>'
        )

    def write(self, out: str | Path) -> Path:
        """Write the page to a file, in one move.

        Raises:
            RecipeError: It cannot be written.
        """
        path = Path(out).expanduser()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            with write_beside(path) as [beside]:
                beside.write_bytes(self.html.encode("utf-8", "replace"))
        except OSError as error:
            raise RecipeError(f"{out} cannot be written ({error.strerror}); give another file with --out") from error
        return path


def make_page(names: Sequence[str], first: Sequence[Section] = ()) -> Page:
    """Make a report of folders of runs, demos and sifted pools, and of lists of rows.

    Args:
        names: The folders, and the CSV files of the lists.
        first: Sections before those of the folders.

    Raises:
        InputError: A folder holds nothing to report on, or a file in it is damaged.
    """
    return page_of(find_subjects(names), first)


def page_of(subjects: Subjects, first: Sequence[Section] = ()) -> Page:
    """The page of what was read."""
    script = _asset("page.js") + _asset("review.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html = _template().render(
        headline=headline(subjects),
        facts=_facts(subjects),
        sections=sections(subjects, first),
        styles="\n".join(map(_asset, _STYLES)),
        dark=_asset("dark.css"),
        script=script,
        digest=digest,
        version=__version__,
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
    )
    return Page(html)


def sections(subjects: Subjects, first: Sequence[Section] = ()) -> list[Section]:
    """The parts of the page that have something to say."""
    runs, several = subjects.runs, len(subjects.runs) > 1
    every: list[Section | None] = [*first, *_reviews(subjects)]
    every += [compare_runs(runs), training(runs), results(runs), suspects(runs)]
    for run in runs:
        every += [*of_run(run, several), *(part(run, several) for part in _OF_A_RUN)]
    sections = [section for section in (*every, setup(runs)) if section is not None]
    anchors = distinct([section.anchor for section in sections])
    return [replace(section, anchor=anchor) for section, anchor in zip(sections, anchors, strict=True)]


def _reviews(subjects: Subjects) -> list[Section]:
    """Sections on sifted pools and lists of rows, with their rows to decide on."""
    several = len(subjects.siftings) + len(subjects.lists) > 1
    sections = []
    for sifting in subjects.siftings:
        name, columns = sifting.name if several else "", sifting.facts.get("columns")
        columns = columns if isinstance(columns, list) and all(isinstance(pair, str) for pair in columns) else []
        sections += of_pool(sifting.pool, sifting.bad, sifting.state, name)
        sections.append(review_of_pool(sifting.decisions, name, columns))
    return sections + [review_of_list(rows, name if several else "") for name, rows in subjects.lists]


def _facts(subjects: Subjects) -> list[tuple[str, str]]:
    """What a single run or sifted pool was, in a few words each."""
    if len(subjects.siftings) == 1 and not subjects.runs:
        (sifting,) = subjects.siftings
        pool = sifting.decisions
        return [
            ("model", str(sifting.facts.get("model", "–"))),
            ("rows of the pool", f"{len(pool.rows):,}"),
            ("selected", f"{sum(row.selected for row in pool.rows):,}"),
            ("limit on the score", short(pool.limits.score)),
            ("limit on similarity", short(pool.limits.similarity)),
        ]
    if len(subjects.runs) != 1:
        return []
    (run,) = subjects.runs
    steps = run.figure("steps")
    return [
        ("method", run.recipe.method),
        ("model", run.recipe.model),
        ("steps", "–" if steps is None else f"{steps:,.0f}"),
        ("time", run.time),
        ("peak memory", memory(run.figure("peak_memory_mb"))),
        ("status", run.status),
    ]


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # everything is escaped: run folders can be untrusted
    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(
        autoescape=True, loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["marked_up"] = marked_up
    return environment.get_template("page.html")


@cache
def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
