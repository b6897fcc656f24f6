"""Losses that a sifting records, a line for a chunk of rows, so that an interrupted call computes only what is missing.

Another limit on the prompts' similarity brings other rows, so that a line names the rows of its losses.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from siftune.base.files import Progress
from siftune.base.ranks import from_first, mean_over_ranks, rank, world_size
from siftune.base.stages import stages
from siftune.data.rows import Row
from siftune.evaluate.likelihood import row_nll
from siftune.models.attention import short_rows
from siftune.models.modules import check_window, model_device
from siftune.sifting.choose import Floats
from siftune.sifting.tuning import before_bad_rows
from siftune.sifting.work import Work, form_of, rows_at_once
from siftune.suspects.answers import Answers, answers_of

_CHUNK = 512  # rows in a line


class _Line(BaseModel):
    """Losses of some rows, summed over label tokens, in nats."""

    rows: list[int]
    tokens: list[Annotated[float, Field(ge=1)]]

    @model_validator(mode="after")
    def _same_lengths(self) -> Self:
        if len({len(values) for _, values in self}) > 1:
            raise ValueError("the lists have different lengths")
        return self

    def table(self) -> Floats:
        """The values, (N, C), which take less memory than lists of numbers."""
        return np.column_stack([np.array(values, np.float64) for name, values in self if name != "rows"])


class _OfAnswers(_Line):
    own: list[float]
    others: list[list[float | None]]  # of the decoys of each row; None without a loss


class _OfBadRows(_Line):
    after: list[float]
    before: list[float]


class Losses(NamedTuple):
    """Losses of rows, summed over label tokens, in nats, and the number of these; each (N,)."""

    tokens: Floats
    after: Floats  # the training on the bad rows
    before: Floats  # that training


def answer_losses(
    work: Work,
    name: str,
    rows: Sequence[Row],
    numbers: Sequence[int],
    decoys_RD: NDArray[np.int64],
    tuned: Callable[[], Any],
) -> Answers:
    """Losses of some rows and of their decoys.

    Args:
        work: The sifting.
        name: Of the file.
        rows: All R rows.
        numbers: Numbers of the rows to score.
        decoys_RD: As of `decoys_of`.
        tuned: Returns the model; called only if something is missing.
    """
    form = form_of(work)

    def scored(own: Sequence[int], progress: Progress) -> Mapping[str, Any]:
        model, mine = tuned(), own[rank() :: world_size()]
        chunk = [rows[number] for number in mine]
        part = answers_of(model, chunk, rows, decoys_RD[mine], form, rows_at_once(work.recipe), progress)
        tokens, losses, *others = _of_all_ranks(np.column_stack([*part]), len(own), model)
        known = [[None if np.isnan(value) else value for value in values] for values in zip(*others, strict=True)]
        return {"tokens": tokens, "own": losses, "others": known}

    tokens, own, *others = _recorded(work, name, _OfAnswers, numbers, scored).T
    return Answers(tokens, own, np.stack(others, axis=1))


def bad_row_losses(work: Work, name: str, data: Dataset, tuned: Callable[[], Any]) -> Losses:
    """Losses of tokenized rows after a training on bad rows and before it; arguments as for `answer_losses`."""

    def scored(own: Sequence[int], progress: Progress) -> Mapping[str, Any]:
        model, rows = tuned(), data.select(own[rank() :: world_size()])
        check_window(model, max(map(len, data.select(own)["input_ids"])), "a row of the pool or the target")
        pairs = list(zip(rows["input_ids"], rows["labels"], strict=True))
        with short_rows():
            after = row_nll(model, pairs, rows_at_once(work.recipe), progress)
            with before_bad_rows(model):
                before = row_nll(model, pairs, rows_at_once(work.recipe))
        part = np.column_stack([np.maximum(after.tokens, 1), after.nll, before.nll])
        return dict(zip(("tokens", "after", "before"), _of_all_ranks(part, len(own), model), strict=True))

    return Losses(*_recorded(work, name, _OfBadRows, range(len(data)), scored).T)


def _recorded(
    work: Work,
    name: str,
    form: type[_Line],
    numbers: Sequence[int],
    scored: Callable[[Sequence[int], Progress], Mapping[str, Any]],
) -> Floats:
    """The values of a file for N rows, (N, C); `scored` computes those that are not in it."""
    lines = from_first(lambda: [(line.rows, line.table()) for line in work.folder.lines(name, form) if line.rows])
    missing = sorted({*numbers} - {number for own, _ in lines for number in own})
    with stages(work.console) as progress:
        for start in range(0, len(missing), _CHUNK):
            own = missing[start : start + _CHUNK]

            def shown(_: str, done: int, of: int, start: int = start, size: int = len(own)) -> None:
                progress("losses of the rows", start + done * size // max(of, 1), len(missing))

            line = {"rows": own, **scored(own, shown)}
            if rank() == 0:
                work.folder.append(name, line)
            lines.append((own, form(**line).table()))
    at = {number: place for place, number in enumerate(number for own, _ in lines for number in own)}
    table_NC = np.concatenate([table for _, table in lines])
    return np.asarray(table_NC[[at[number] for number in numbers]])


def _of_all_ranks(part_NC: NDArray[np.float64], count: int, model: Any) -> list[list[float]]:
    """Columns of the values that each rank has computed for its part of the rows."""
    every = torch.zeros(count, part_NC.shape[1], dtype=torch.float64)
    every[rank() :: world_size()] = torch.from_numpy(part_NC)
    columns: list[list[float]] = (mean_over_ranks(every, model_device(model)) * world_size()).T.tolist()
    return columns
