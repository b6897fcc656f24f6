"""Scores of a pool by a few rows: the trainings on them, and the losses of the pool.

Each part is written to the folder of a sifting as soon as it is computed, so that an interrupted call continues: see
sift.py. Prompts are compared first (prompts.py), so that only rows of the target's task need a loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray

from siftune.base.errors import DataError
from siftune.base.text import counted
from siftune.data.decisions import DIGITS
from siftune.data.rows import Row
from siftune.models.loss import IGNORED
from siftune.sifting.choose import (
    NO_LIMITS,
    Choice,
    Floats,
    Limits,
    choose_by_losses,
    choose_by_margins,
    lowest,
    scores,
    unlike,
)
from siftune.sifting.lines import answer_losses, bad_row_losses
from siftune.sifting.pool import PARTS, Few
from siftune.sifting.prompts import similarities
from siftune.sifting.similarity import task_limit
from siftune.sifting.tuning import (
    AVOID,
    of_training,
    tuned_on_bad_rows,
    tuned_on_target,
)
from siftune.sifting.work import LOSSES, Work
from siftune.suspects.answers import Answers
from siftune.suspects.decoys import SHARED, decoys_of
from siftune.suspects.margins import margins
from siftune.train.guards.memory import free
from siftune.train.prepare import Prepared


@dataclass(frozen=True)
class Part:
    """Scores of a pool by the target or by the bad rows, and the choice by them."""

    choice: Choice  # by the target, or by the bad rows
    columns: Mapping[str, Floats]  # of its scores.csv, each (R,); NaN for rows without the value
    limits: Limits = NO_LIMITS  # by which rows were selected


def choose_by_target(work: Work, prepared: Prepared, few: Few, count: int | None, limits: Limits) -> Part:
    """Score the pool by the target, and choose.

    Scores and similarities are rounded as in the file: a limit that is read there selects the same rows.

    Args:
        work: The sifting.
        prepared: The rows.
        few: The target.
        count: Number of rows to select; None: those within the limits.
        limits: Limits that replace those of the target's own rows.

    Raises:
        DataError: No row is within the limits, or a loss is not finite.
    """
    similar_R, similar_K = (np.round(part, DIGITS) for part in similarities(work, prepared, PARTS[few.name]))
    least = task_limit(similar_R, similar_K) if limits.similarity is None else limits.similarity
    task_R = similar_R >= least
    if not task_R.any() and count is None:
        raise DataError(
            f"no prompt of the pool is like those of {few.file}: the highest similarity is {_shown(similar_R.max())}, "
            f"the limit {_shown(least)}; give a pool with rows of the task, a lower min_similarity, or a share"
        )
    trained_R = _likely(similar_R, similar_K)  # whatever the limit: a new one selects without training again
    other_R = _other_answers(work, prepared, few, task_R | trained_R, trained_R)
    left_out_R = task_R & other_R
    task_R, trained_R = task_R & ~other_R, trained_R & ~other_R
    if not task_R.any() and count is None:
        raise DataError(
            f"no row of the pool with a prompt like those of {few.file} shares its answer with another such row: give "
            "a pool with rows of the task, spell equal answers alike, or give a share"
        )
    scores_R, target_T, decoys_D = _target_scores(work, prepared, few, task_R, trained_R)
    columns = {"score": scores_R, "similarity": similar_R}
    if count is not None:
        compared_R = ~np.isnan(scores_R)
        rows_R = lowest(np.where(compared_R, scores_R, -similar_R), count, compared_R)
        others = count - int(compared_R.sum())
        rest = f", {others:,} of them by their prompts alone" if others > 0 else ""
        return Part(Choice(rows_R, f"those with the lowest scores, as many as asked for{rest}"), columns)
    if decoys_D is None:
        numbers: dict[str, int] = {}
        for row in prepared.rows[PARTS[few.name]]:
            numbers.setdefault(row.completion.strip(), len(numbers))
        answers_R = np.array([numbers.get(row.completion.strip(), -1) for row in prepared.rows["train"]])
        choice = choose_by_margins(scores_R, target_T, task_R, answers_R, limits.score)
    else:
        choice = choose_by_losses(scores_R, target_T, decoys_D, task_R, limits.score)
    if left_out_R.any():
        of_others = f"{counted(int(left_out_R.sum()), 'row')} with answers that no row with a similar prompt has"
        choice = choice._replace(reason=f"{choice.reason}; left out as of other tasks: {of_others}")
    if not choice.rows_R.any():
        assert choice.limit is not None  # without one, all rows of the task are selected
        raise DataError(
            f"no row of the pool is like those of {few.file}: the lowest score is {_shown(np.nanmin(scores_R))}, the "
            f"limit {_shown(choice.limit)}; give a pool with rows of the task, a higher max_score, or a share"
        )
    return Part(choice, columns, Limits(choice.limit, least))


def _likely(similar_R: Floats, similar_K: Floats) -> NDArray[np.bool_]:
    """Rows of the pool that are of the task by `task_limit`; if there are none, the most similar ones, (R,).

    As many as the target has different prompts are then taken (ours).
    """
    least = task_limit(similar_R, similar_K)
    if similar_R.max() < least:
        least = float(np.sort(similar_R)[-len(similar_K) :][0])
    return similar_R >= least


def _shown(value: float) -> str:
    """A score or a similarity in a message, without zeros at its end."""
    return str(round(float(value), DIGITS))


def choose_by_bad_rows(work: Work, prepared: Prepared, few: Few) -> Part:
    """Score the pool by the bad rows, and choose the rows that remain.

    Raises:
        DataError: A loss is not finite.
    """
    data, held_out = _tokens(prepared, "train"), _tokens(prepared, AVOID).select(_places(prepared, few, few.unseen[0]))
    tuned = cache(partial(tuned_on_bad_rows, work, few))  # loaded at most once, and only if something is missing
    every = concatenate_datasets([data, held_out])
    losses = bad_row_losses(work, f"{AVOID}/{LOSSES}", every, tuned)
    tuned.cache_clear()
    free()
    after, before = losses.after / losses.tokens, losses.before / losses.tokens
    _refuse_broken(after + before, [*prepared.rows["train"], *few.unseen[0]])
    count, score = len(data), after - before
    columns = {"score": score[:count], "loss_after": after[:count], "loss_before": before[:count]}
    return Part(unlike(score[:count], score[count:]), columns)


_COVERED = 0.9  # share of the target's rows, at least, whose answers rows with similar prompts have, too (ours)


def _other_answers(
    work: Work, prepared: Prepared, few: Few, asked_R: NDArray[np.bool_], likely_R: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Rows of the pool that are of another task by their answers, (R,) (ours).

    If rows with similar prompts share the answers of nine in ten target rows, such are the rows whose answer none of
    these has. Otherwise there are none.

    Args:
        work: The sifting.
        prepared: The rows.
        few: The target.
        asked_R: Rows of the pool to ask for.
        likely_R: Those with prompts like the target's, whose answers count, as do those of the target.
    """
    rows, count = [*prepared.rows["train"], *prepared.rows[PARTS[few.name]]], len(asked_R)
    target, asked = range(count, len(rows)), asked_R.nonzero()[0].tolist()
    every = [*likely_R.nonzero()[0].tolist(), *target]
    other_R = np.zeros(count, bool)
    if decoys_of(rows, work.recipe.seed, target, every).covered[count:].mean() >= _COVERED:
        other_R[asked] = ~decoys_of(rows, work.recipe.seed, asked, every).covered[asked]
    return other_R


class _Scores(NamedTuple):
    """Scores by the target.

    Attributes:
        pool: (R,) of the pool, the mean over the trainings; NaN outside of the task.
        held_out: (T,) of the target's rows that the trainings left out.
        decoys: (D,) of decoys of these; None if the scores are margins.
    """

    pool: Floats
    held_out: Floats
    decoys: Floats | None


def _target_scores(
    work: Work, prepared: Prepared, few: Few, task_R: NDArray[np.bool_], likely_R: NDArray[np.bool_]
) -> _Scores:
    """Score rows by margins if they share a few answers, otherwise by losses: see `scores`.

    Args:
        work: The sifting.
        prepared: The rows.
        few: The target.
        task_R: Rows of the pool to score, those of the task.
        likely_R: Rows of the pool whose answers are compared, and on which the model is trained first.
    """
    of_pool, of_target = prepared.rows["train"], prepared.rows[PARTS[few.name]]
    rows, count = [*of_pool, *of_target], len(of_pool)
    task, likely = (part_R.nonzero()[0].tolist() for part_R in (task_R, likely_R))
    target = range(count, len(rows))
    every = [*likely, *target]  # whatever the limit on the similarity, so that recorded losses hold
    shared = decoys_of(rows, work.recipe.seed, target, every).covered[count:].mean() >= SHARED
    if shared:
        decoys_RD = decoys_of(rows, work.recipe.seed, [*task, *target], every).numbers
    else:
        decoys_RD = decoys_of(rows, work.recipe.seed, target, target).numbers
    trained = [of_pool[number] for number in likely] if shared else []
    tokens_R = _label_tokens(prepared, few, decoys_RD)
    of_task, held_out, of_decoys = list[Floats](), list[Floats](), list[Floats]()
    for number, unseen in enumerate(few.unseen):
        numbers = [*task, *(count + place for place in _places(prepared, few, unseen))]
        tuned = cache(partial(tuned_on_target, work, few, number, trained))
        losses = answer_losses(work, of_training(number, LOSSES), rows, numbers, decoys_RD, tuned)
        tuned.cache_clear()
        free()
        _refuse_broken(losses.own, [rows[place] for place in numbers])
        if shared:
            scores_N = _margins(rows, tokens_R, numbers, decoys_RD, losses)
        else:
            scores_N, asked_ND = scores(losses.own, losses.tokens), ~np.isnan(losses.others)
            of_decoys.append(scores(losses.others[asked_ND], tokens_R[decoys_RD[numbers][asked_ND]]))
        of_task.append(scores_N[: len(task)])
        held_out.append(scores_N[len(task) :])
    pool_R = np.full(len(task_R), np.nan)
    pool_R[task] = np.mean(of_task, axis=0)
    decoys_D = None if shared else np.concatenate(of_decoys).round(DIGITS)
    return _Scores(pool_R.round(DIGITS), np.concatenate(held_out).round(DIGITS), decoys_D)


def _margins(
    rows: Sequence[Row], tokens_R: Floats, numbers: Sequence[int], decoys_RD: NDArray[np.int64], losses: Answers
) -> Floats:
    """Margins of N of all R rows."""
    own_R, others_RD = np.full(len(rows), np.nan), np.full(decoys_RD.shape, np.nan)
    own_R[numbers], others_RD[numbers] = losses.own, losses.others
    tokens_R = tokens_R.copy()
    tokens_R[numbers] = losses.tokens
    answers_R = [row.completion.strip() for row in rows]
    return margins(answers_R, tokens_R, own_R, decoys_RD, others_RD).score[numbers]


def _label_tokens(prepared: Prepared, few: Few, decoys_RD: NDArray[np.int64]) -> Floats:
    """Numbers of label tokens, (R,), of rows that serve as decoys; 1 of others."""
    data = concatenate_datasets([_tokens(prepared, "train"), _tokens(prepared, PARTS[few.name])])
    tokens_R, numbers = np.ones(len(data)), np.unique(decoys_RD[decoys_RD >= 0])
    if len(numbers):
        labels = data.select(numbers)["labels"]
        tokens_R[numbers] = [max(sum(label != IGNORED for label in own), 1) for own in labels]
    return tokens_R


def _tokens(prepared: Prepared, part: str) -> Dataset:
    return prepared.data[part].select_columns(["input_ids", "labels"])


def _places(prepared: Prepared, few: Few, rows: Sequence[Row]) -> list[int]:
    """Numbers of rows among the tokenized rows of the target, or among the bad rows."""
    origins = {row.origin for row in rows}
    return [number for number, row in enumerate(prepared.rows[PARTS[few.name]]) if row.origin in origins]


def _refuse_broken(values: Floats, rows: Sequence[Row]) -> None:
    if not np.isfinite(values).all():
        place = rows[int(np.isfinite(values).argmin())].origin
        raise DataError(f"the loss of {place} is not finite: leave the row out, or give --dtype float32")
