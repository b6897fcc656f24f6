"""Losses of rows and of other answers to their prompts, under the tuned model."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from siftune.base.stages import stages
from siftune.data.rows import Row
from siftune.engine.ranks import from_first, mean_over_ranks, rank, world_size
from siftune.models.modules import model_device
from siftune.sifting.work import Work, form_of, rows_at_once
from siftune.suspects.answers import Answers, answers_of
from siftune.suspects.decoys import Decoys, decoys_of

_CHUNK = 512  # rows in a line of the file


class _Line(BaseModel):
    """Losses of some rows, as a line of their file."""

    rows: list[int]
    tokens: list[Annotated[float, Field(ge=1)]]
    own: list[float]
    others: list[list[float | None]]  # of the decoys of each row; None without a loss

    @model_validator(mode="after")
    def _same_lengths(self) -> Self:
        if len({len(values) for _, values in self}) > 1:
            raise ValueError("the lists have different lengths")
        return self


def decoys_among(rows: Sequence[Row], numbers: Sequence[int], candidates: Sequence[int], seed: int) -> Decoys:
    """Decoys of some rows, and of the candidates; none of other rows.

    Args:
        rows: All R rows.
        numbers: Numbers of the rows that get decoys.
        candidates: Numbers of the rows that may serve; other limits on the similarity leave them as they are.
        seed: As for `decoys_of`.
    """
    every = np.array(sorted({*numbers, *candidates}))
    own = decoys_of([rows[number] for number in every], seed, np.searchsorted(every, candidates).tolist())
    decoys_RD, covered_R = np.full((len(rows), own.numbers.shape[1]), -1), np.zeros(len(rows), bool)
    decoys_RD[every] = np.where(own.numbers < 0, -1, every[own.numbers])
    covered_R[every] = own.covered
    return Decoys(decoys_RD, covered_R)


def answer_losses(
    work: Work,
    name: str,
    rows: Sequence[Row],
    numbers: Sequence[int],
    decoys_RD: NDArray[np.int64],
    tuned: Callable[[], Any],
) -> Answers:
    """Losses of some rows and of their decoys; those that are in the file are not computed again.

    Another limit on the prompts' similarity brings other rows, so that a line of the file names the rows of its losses.

    Args:
        work: The sifting.
        name: Of the file.
        rows: All R rows.
        numbers: Numbers of the rows to score.
        decoys_RD: As of `decoys_of`.
        tuned: Returns the model.
    """
    lines = from_first(lambda: work.folder.lines(name, _Line))
    form = form_of(work, work.recipe.completion_only)
    missing = sorted({*numbers} - {number for line in lines for number in line.rows})
    with stages(work.console) as progress:
        for start in range(0, len(missing), _CHUNK):
            model, own = tuned(), missing[start : start + _CHUNK]
            part_NC = torch.zeros(len(own), 2 + decoys_RD.shape[1], dtype=torch.float64)
            mine = own[rank() :: world_size()]  # each rank has a part of the rows

            def shown(_: str, done: int, of: int, start: int = start, size: int = len(own)) -> None:
                progress("losses of the rows", start + done * size // max(of, 1), len(missing))

            scored = answers_of(
                model, [rows[number] for number in mine], rows, decoys_RD[mine], form, rows_at_once(work.recipe), shown
            )
            part_NC[rank() :: world_size()] = torch.from_numpy(np.column_stack([*scored]))
            tokens_N, own_N, *others = (mean_over_ranks(part_NC, model_device(model)) * world_size()).T.tolist()
            losses = [[None if np.isnan(value) else value for value in values] for values in zip(*others, strict=True)]
            line = {"rows": own, "tokens": tokens_N, "own": own_N, "others": losses}
            if rank() == 0:
                work.folder.append(name, line)
            lines.append(_Line(**line))
    values = {
        row: each for line in lines for row, *each in zip(line.rows, line.tokens, line.own, line.others, strict=True)
    }
    columns = zip(*(values[number] for number in numbers), strict=True)
    return Answers(*(np.array(column, np.float64) for column in columns))
