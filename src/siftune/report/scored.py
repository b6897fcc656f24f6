"""Rows of decision files, as report pages show them: the scores of a sifted pool, or a list of rows."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from siftune.base.errors import InputError
from siftune.base.text import finite
from siftune.data.decisions import PLACE, SELECTED, csv_lines, is_selected
from siftune.sifting.choose import NO_LIMITS, Limits
from siftune.sifting.sift import SCORES
from siftune.sifting.tuning import AVOID

logger = logging.getLogger(__name__)

TEXTS = ("source", "prompt", "completion", "reason")  # columns; the others are numbers

# states of a row, in their order on a page
CHOSEN, BY_SCORE, LIKE_BAD, OTHER = "selected", "score", "like the bad rows", "other task"


class Scored(NamedTuple):
    """A row of a decision file.

    Attributes:
        fields: Its fields as in the file, in the order of the header.
        place: Its place.
        selected: Whether a training takes it.
        score: Its score; None if it has none, as a row of another task or a bad row in the pool.
        similarity: Similarity of its prompt to the target's; None if it has none.
        losses: Losses before and after a training on bad rows; None if it has none.
        source: Its source.
        prompt: Its prompt as in the file, which may be cut: see `plain`.
        completion: Its completion as in the file.
        state: "selected", or why a sifted pool goes without it; empty in another file.
    """

    fields: Sequence[str]
    place: str
    selected: bool
    score: float | None
    similarity: float | None
    losses: tuple[float, float] | None
    source: str
    prompt: str
    completion: str
    state: str = ""


class DecisionList(NamedTuple):
    """The rows of a decision file: its header, and its rows in their order."""

    path: Path
    header: Sequence[str]
    rows: list[Scored]


def read_list(path: Path) -> DecisionList:
    """Read a decision file.

    Raises:
        InputError: It cannot be read, it is no decision file, or it has no rows; the message names the file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): write it again") from error
    if not text.endswith("\n"):
        logger.warning("%s does not end with a line break: its last row may be cut off", path)
    advice = "give scores.csv of siftune sift, or a file of siftune rows --csv"
    header, lines = csv_lines(path, text, (PLACE, SELECTED, "prompt", "completion"), advice)
    rows = []
    for number, fields in lines:
        try:
            rows.append(_scored(dict(zip(header, fields, strict=True)), fields))
        except ValueError as error:
            raise InputError(f"{path}:{number} cannot be read ({error}): correct the line") from None
    if not rows:
        raise InputError(f"{path} has no rows: give a list with rows")
    return DecisionList(path, header, rows)


def _scored(line: dict[str, str], fields: Sequence[str]) -> Scored:
    before, after = (_number(line.get(name, "")) for name in ("loss_before", "loss_after"))
    return Scored(
        tuple(fields),
        line[PLACE],
        is_selected(line[SELECTED]),
        _number(line.get("score", "")),
        _number(line.get("similarity", "")),
        None if before is None or after is None else (before, after),
        line.get("source", ""),
        line["prompt"],
        line["completion"],
    )


def _number(text: str) -> float | None:
    return finite(text) if text.strip() else None


def plain(field: str) -> str:
    """The text of a field, without the apostrophe that keeps a spreadsheet from computing it.

    Example:
        >>> plain("'=1+1"), plain("'tis")
        ('=1+1', "'tis")
    """
    return field[1:] if field.startswith("'") and field[1:2] in ("=", "+", "-", "@", "\t", "\n") else field


@dataclass(frozen=True)
class Pool:
    """A sifted pool.

    Attributes:
        path: Its file of scores.
        header: Columns of the file.
        rows: Its rows in the order of their scores.
        count: Number of rows that are selected by a target, or left out by bad rows.
        border: Number of rows before the limit on the score. By a target, some that follow may be selected, too.
        limits: The limits by which rows were selected, if there were any.
    """

    path: Path
    header: Sequence[str]
    rows: list[Scored]
    count: int
    border: int
    limits: Limits = NO_LIMITS


def by_target(folder: Path, state: dict[str, Any]) -> Pool | None:
    """The pool of a folder of `siftune sift`, by the scores of the target; None without a target.

    Rows of the task by score come first, then those without one that are selected, those like the bad rows, and other
    tasks by their prompts.

    Raises:
        InputError: As `read_list`.
    """
    if not (folder / SCORES).is_file():
        return None
    read, bad = read_list(folder / SCORES), by_bad_rows(folder)
    limits = Limits(_limit(state, "score_limit"), _limit(state, "similarity_limit"))
    like_bad = {row.place for row in bad.rows if not row.selected} if bad else set()
    outside = -math.inf if limits.similarity is None else limits.similarity

    def state_of(row: Scored) -> str:
        if row.selected:
            return CHOSEN
        if row.similarity is None:  # of the pool's rows, only bad rows in it are not compared
            return LIKE_BAD
        if row.score is None or row.similarity < outside:
            return OTHER
        return LIKE_BAD if row.place in like_bad else BY_SCORE

    rows = [row._replace(state=state_of(row)) for row in read.rows]
    rows.sort(key=_order)
    count = border = sum(row.selected for row in rows)
    if limits.score is not None:
        task = [row.score for row in rows if row.state in (CHOSEN, BY_SCORE) and row.score is not None]
        border = sum(score <= limits.score for score in task)
    return Pool(read.path, read.header, rows, count, border, limits)


def _limit(state: dict[str, Any], name: str) -> float | None:
    """A limit from the record of a sifting; None without one."""
    try:
        return finite(state[name])
    except (KeyError, TypeError, ValueError):
        return None


def _order(row: Scored) -> tuple[int, bool, float]:
    by_prompt = row.state == OTHER or row.score is None
    place = {CHOSEN: 1 if by_prompt else 0, BY_SCORE: 0, LIKE_BAD: 2, OTHER: 3}[row.state]
    return place, by_prompt, -(row.similarity or 0.0) if by_prompt or row.score is None else row.score


def by_bad_rows(folder: Path) -> Pool | None:
    """The pool of a folder of `siftune sift`, by the scores of the bad rows, lowest first; None without bad rows.

    Raises:
        InputError: As `read_list`.
    """
    path = folder / AVOID / SCORES
    if not path.is_file():
        return None
    read = read_list(path)
    rows = [row._replace(state=CHOSEN if row.selected else LIKE_BAD) for row in read.rows]
    rows.sort(key=lambda row: (row.selected, -math.inf if row.score is None else row.score))
    count = sum(not row.selected for row in rows)
    return Pool(path, read.header, rows, count, count)
