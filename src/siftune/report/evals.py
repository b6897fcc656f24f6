"""Measurements of `siftune eval` and the demo: their table, and RUN/eval.json.

The file is a list of measurements, the newest last, one for each file of held-out rows, and before it one for each part
of them that was measured since: `data`, `digest`, `rows`, `level`, `metrics` (see `MetricRow`), and the first answers
of base and tuned model, if they generated any.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from siftune.base.errors import InputError
from siftune.base.files import write_beside
from siftune.base.json_files import read_json, sealed, unsealed
from siftune.base.text import finite, jsonable, one_line
from siftune.data.rows import Row, row_texts, text_of
from siftune.evaluate.measure import PERPLEXITY, Metric, MetricRow
from siftune.report.table import Table
from siftune.report.words import percent, points, short
from siftune.train.folder.run_folder import EVALS

logger = logging.getLogger(__name__)

_AGAIN = "remove it, and run siftune eval again"
_SHOWN = 20  # answers that are kept: the first rows, not chosen ones


@dataclass(frozen=True)
class Answer:
    """What two models wrote for a row."""

    prompt: str  # the row's turns before the completion
    right: str  # what counts as right: the row's answer, or its completion
    base: str  # what the base model wrote
    tuned: str
    base_right: bool
    tuned_right: bool


@dataclass(frozen=True)
class Eval:
    """A base model and a tuned one, measured on the same rows."""

    data: str  # the rows' file or hub id, as it was given
    rows: int
    level: float  # coverage of the intervals
    metrics: tuple[MetricRow, ...]
    answers: tuple[Answer, ...] = ()  # the first rows' answers; empty where the models wrote none
    digest: str = ""  # of the rows; empty if unknown

    @property
    def same(self) -> tuple[str, int]:
        """Equal for measurements on the same rows, whatever their file is called."""
        return self.digest or self.data, self.rows


def digest_of_rows(rows: Sequence[Row]) -> str:
    """Hash of the texts, right answers and choices of rows, in their order."""
    answers = (repr((row.extra.get("answer"), row.extra.get("choices"))).encode() for row in rows)
    parts = (part for pair in zip(row_texts(rows), answers, strict=True) for part in pair)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def answers_of(rows: Sequence[Row], base: Mapping[str, Metric], tuned: Mapping[str, Metric]) -> tuple[Answer, ...]:
    """The first rows' answers, where the models wrote any."""
    if "exact_match" not in base or not base["exact_match"].texts:
        return ()
    before, after = base["exact_match"], tuned["exact_match"]
    return tuple(
        Answer(
            text_of(row).prompt,
            _right(row),
            before.texts[i],
            after.texts[i],
            bool(before.values[i]),
            bool(after.values[i]),
        )
        for i, row in enumerate(rows[:_SHOWN])
    )


def _right(row: Row) -> str:
    answer = row.extra.get("answer")
    return answer.strip() if isinstance(answer, str) and answer.strip() else row.completion.strip()


def record_eval(run: Path, found: Eval, is_part: bool = False) -> None:
    """Keep a measurement in a run's folder, in the place of earlier ones on the same rows or another state of the file.

    Metrics that only one on the same rows has, and its answers, remain. Logs a warning if the folder cannot be written
    to, because the measurement itself succeeded.

    Args:
        run: The run folder.
        found: The measurement.
        is_part: Whether it is on a part of the file's rows; one on all of them stays the newest.
    """
    try:
        before = read_evals(run)
        others = [one for one in before if one.same != found.same and (is_part or one.data != found.data)]
        for old in before:
            if (old.same, old.level) == (found.same, found.level):
                names = {metric.metric for metric in found.metrics}
                kept = (metric for metric in old.metrics if metric.metric not in names)
                found = replace(found, metrics=(*found.metrics, *kept), answers=found.answers or old.answers)
        first = is_part and any(one.data == found.data for one in others)
        every = [found, *others] if first else [*others, found]
        text = json.dumps([sealed(_plain(one)) for one in every], indent=1)
        with write_beside(run / EVALS) as [beside]:
            beside.write_text(f"{text}\n", encoding="utf-8")
    except (OSError, InputError) as error:
        logger.warning("%s keeps no record of this measurement: %s", run, error)


def _plain(one: Eval) -> Any:
    """A measurement in the types of JSON, without half a surrogate pair, which an answer may have."""
    text = json.dumps(jsonable(asdict(one)), ensure_ascii=False)
    return json.loads(text.encode(errors="replace"))


def read_evals(run: Path) -> list[Eval]:
    """What was measured of a run; none where nothing was.

    Raises:
        InputError: The record is damaged.
    """
    path = run / EVALS
    if not path.exists():
        return []
    records = [unsealed(record) for record in read_json(path, list[dict[str, Any]], _AGAIN)]
    if None in records:
        raise InputError(f"{path} cannot be read (it is not what was written); {_AGAIN}")
    try:
        return [_eval(record) for record in records if record is not None]
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} cannot be read ({one_line(str(error))}); {_AGAIN}") from error


def _eval(record: Mapping[str, Any]) -> Eval:
    """A measurement from an untrusted file; every value is converted to its type, or fails."""
    metrics = tuple(_metric(metric) for metric in record["metrics"])
    answers = tuple(_answer(answer) for answer in record["answers"])
    data, rows, level = str(record["data"]), int(record["rows"]), finite(record["level"])
    return Eval(data, rows, level, metrics, answers, str(record.get("digest", "")))


def _answer(record: Mapping[str, Any]) -> Answer:
    prompt, right, base, tuned = (str(record[name]) for name in ("prompt", "right", "base", "tuned"))
    return Answer(prompt, right, base, tuned, bool(record["base_right"]), bool(record["tuned_right"]))


def _metric(record: Mapping[str, Any]) -> MetricRow:
    tuned, difference, low, high = (_number(record.get(name)) for name in ("tuned", "difference", "low", "high"))
    pairs = (_pair(record.get(name)) for name in ("base_interval", "tuned_interval"))
    base = finite(record["base"])
    return MetricRow(str(record["metric"]), int(record["rows"]), base, tuned, difference, low, high, *pairs)


def _number(value: Any) -> float | None:
    return None if value is None else finite(value)


def _pair(value: Any) -> tuple[float, float] | None:
    return None if value is None else (finite(value[0]), finite(value[1]))


_LABELS = {
    "choices": "multiple choice",
    "choices_per_token": "multiple choice, per token",
    "exact_match": "exact match",
}


def metric_table(
    title: str, rows: Sequence[MetricRow], level: float = 0.95, names: tuple[str, str] = ("base", "tuned")
) -> Table:
    """Make a table of the metrics of one model, or of a base model against a tuned one.

    `rows` are those of `compare`, `level` is the coverage of their intervals, `names` what the two models are called.
    """
    interval = f"{100 * level:g} % interval"
    if all(row.tuned is None for row in rows):
        return Table(["metric", "rows", "value", interval], [_single(row) for row in rows], title)
    header = ["metric", "rows", *names, "difference", interval]
    return Table(header, [_compared(row) for row in rows], title)


def _single(row: MetricRow) -> list[str]:
    bounds = row.base_interval or ()
    interval = " to ".join(value_text(row.metric, bound) for bound in bounds)
    return [label_of(row.metric), str(row.rows), value_text(row.metric, row.base), interval]


def _compared(row: MetricRow) -> list[str]:
    values = (value_text(row.metric, value) for value in (row.base, row.tuned))
    difference, low, high = (change_text(row.metric, value) for value in (row.difference, row.low, row.high))
    return [label_of(row.metric), str(row.rows), *values, difference, f"{low} to {high}"]


def label_of(metric: str) -> str:
    """What a metric is called."""
    return _LABELS.get(metric, metric)


def value_text(metric: str, value: float | None) -> str:
    """A value of a metric, as text."""
    return short(value, 4) if metric == PERPLEXITY else percent(value)


def change_text(metric: str, value: float | None) -> str:
    """A difference of a metric, as text with its sign; of shares in points."""
    if metric != PERPLEXITY:
        return points(value)
    return f"{'+' if value is not None and value > 0 else ''}{short(value)}"
