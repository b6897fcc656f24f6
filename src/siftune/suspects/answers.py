"""Losses of rows, and of other answers to their prompts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from siftune.base.files import Progress
from siftune.data.rows import Row
from siftune.data.tokens import Form, tokens_of
from siftune.evaluate.likelihood import row_nll, shared_nll
from siftune.models.attention import short_rows
from siftune.models.modules import check_window


class Answers(NamedTuple):
    """Losses of R rows and of D other answers to each prompt, summed over label tokens, in nats.

    Attributes:
        tokens: (R,) float64 numbers of label tokens; 0 for rows that cannot be tokenised, such as those of cut prompts.
        own: (R,) float64 losses of the rows; NaN for these.
        others: (R, D) float64 losses of the other answers; NaN where there is none.
    """

    tokens: NDArray[np.float64]
    own: NDArray[np.float64]
    others: NDArray[np.float64]


def answers_of(
    model: Any,
    rows: Sequence[Row],
    every: Sequence[Row],
    decoys_RD: NDArray[np.int64],
    form: Form,
    batch_size: int,
    progress: Progress | None = None,
) -> Answers:
    """Score rows, and their prompts with the completions of other rows.

    Args:
        model: The model.
        rows: The rows.
        every: Rows whose completions are compared.
        decoys_RD: Their numbers, for each row; -1 where there is none.
        form: Settings of tokenisation.
        batch_size: Rows per forward pass.
        progress: Receives the number of scored rows and decoys.
    """
    at, column = np.nonzero(decoys_RD >= 0)
    pairs_of = zip(at.tolist(), decoys_RD[at, column].tolist(), strict=True)
    crossed = [replace(rows[row], completion=every[other].completion) for row, other in pairs_of]
    scored = [*rows, *crossed]
    nll, counts = np.full(len(scored), np.nan), np.zeros(len(scored))
    if scored:
        tokens = tokens_of(scored, form)
        columns = tokens.data[:]  # all at once: reading row by row takes longer than a small model's pass
        pairs = list(zip(columns["input_ids"], columns["labels"], strict=True))
        usable = [place for place in range(len(scored)) if place not in tokens.bad]
        check_window(model, max((len(ids) for ids, _ in pairs), default=0), "a prompt with another row's completion")
        score = shared_nll if crossed else row_nll
        with short_rows():
            result = score(model, pairs, batch_size, progress, "losses of the rows")
        nll[usable], counts[usable] = result.nll, result.tokens
    others_RD = np.full(decoys_RD.shape, np.nan)
    others_RD[at, column] = nll[len(rows) :]
    return Answers(counts[: len(rows)], nll[: len(rows)], others_RD)
