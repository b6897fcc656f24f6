"""The stages of an audit: measurements, attacks on the return, and recovery.

*Recovery* asks how much of the base an emulator can be made into, given rows and time. All decoder layers of the
emulator are tuned. An attacker takes the best learning rate, so several are tried, and the best one on the held-out
rows counts. A run is measured after an eighth, a quarter and half of its steps too, which shows whether more rows would
help. The learning rate falls along a run, so that its early points are a little below those of a run of that length.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from datasets import Dataset, concatenate_datasets
from torch import nn

from siftune.base.errors import DataError
from siftune.base.files import Progress
from siftune.evaluate.bootstrap import Bootstrap, Floats, resample
from siftune.models.layers import find_layers
from siftune.offsite.audits.lira import confidence, halves, lira
from siftune.offsite.audits.members import AuditRows, RowScores, drawn, not_among, score_losses, score_rows
from siftune.offsite.audits.membership import Membership, RowLosses, infer_membership, measure_attack
from siftune.offsite.audits.models import OffsiteModels, Steps, Tuning, plugged, read_outer, tuned
from siftune.offsite.audits.result import LABELS, RECOVERED, RecoveryPoint, negative
from siftune.offsite.audits.settings import AuditSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidates:
    """Rows for membership inference."""

    members: list[int]  # indices of training rows that the outer layers were tuned on
    others: list[int]  # indices of held-out rows that are no training rows
    left_out: int  # held-out rows that are


@dataclass(frozen=True)
class Job:
    """All that the stages need."""

    models: OffsiteModels
    rows: AuditRows
    settings: AuditSettings
    used: list[int]  # indices of the training rows that are tuned on
    candidates: Candidates | None  # None to leave membership inference out
    progress: Progress | None = None  # told what is being done

    @property
    def bootstrap(self) -> Bootstrap:
        """Settings of the intervals."""
        return Bootstrap(self.settings.resamples, self.settings.level, self.settings.seed)

    @property
    def tuning(self) -> Tuning:
        """Rows and settings of every tuning."""
        return Tuning(self.rows.train.select(self.used), self.models.tokenizer, self.settings)

    def outer(self, model: nn.Module) -> list[int]:
        """Numbers of a model's outer layers."""
        return self.models.split.outer(len(find_layers(model).layers))

    def steps(self, condition: str) -> Steps:
        """Progress of a tuning, called for every step."""
        return partial(self.tell, f"{LABELS[condition]}: tuning")

    def measure(self, condition: str, model: nn.Module) -> RowScores:
        """A model's scores on the held-out rows."""
        self.tell(f"{LABELS[condition]}: measuring")
        scores = score_rows(model, self.rows, self.settings.eval_batch_size)
        self.tell(f"{LABELS[condition]}: measuring", 1)
        return scores

    def losses(self, model: nn.Module, data: Dataset) -> Floats:
        """A model's mean loss per token of any rows, in nats."""
        return score_losses(model, data, self.settings.eval_batch_size).per_token

    def tell(self, what: str, done: int = 0, total: int = 1) -> None:
        """Pass progress on."""
        if not done:
            logger.info("%s", what)
        if self.progress is not None:
            self.progress(what, done, total)


def choose_rows(rows: AuditRows, settings: AuditSettings) -> list[int]:
    """Indices of the training rows to tune on: no more than the steps suffice for, so that each of them is seen."""
    return drawn(range(len(rows.train)), settings.steps * settings.batch_size, settings.seed)


def choose_candidates(rows: AuditRows, settings: AuditSettings, trained: Sequence[int]) -> Candidates:
    """Draw rows for membership inference; `trained` are the training rows that the outer layers were tuned on.

    Raises:
        DataError: No held-out row is left.
    """
    others = not_among(rows.held_out, rows.train)
    if not others:
        raise DataError(
            "every held-out row is a training row too, so membership cannot be inferred; give held-out rows of their "
            "own, or leave membership out"
        )
    members, outsiders = (drawn(indices, settings.membership_rows, settings.seed) for indices in (trained, others))
    return Candidates(members, outsiders, left_out=len(rows.held_out) - len(others))


Sides = tuple[RowLosses, RowLosses]  # of members and others


def attack(
    job: Job, plug: Callable[[], AbstractContextManager[None]], zero_shot: RowScores, plug_in: RowScores
) -> Membership | None:
    """Infer membership from losses; None where the job has no candidates.

    The job's base may be the emulator itself, for whoever has no other. `plug` puts the tuned layers into it for a
    while; its scores on the held-out rows before that, `zero_shot`, and with them, `plug_in`, are known already.
    """
    candidates, base = job.candidates, job.models.base
    if candidates is None:
        return None
    job.tell("membership inference")
    members = job.rows.train.select(candidates.members)
    before = job.losses(base, members)
    with plug():
        after = job.losses(base, members)
    job.tell("membership inference", 1)
    sides = (
        RowLosses(before, after),
        RowLosses(*(scores.per_token[candidates.others] for scores in (zero_shot, plug_in))),
    )
    membership = infer_membership(*sides, candidates.left_out, job.bootstrap)
    return with_shadows(job, membership, sides) if job.settings.shadows else membership


def with_shadows(job: Job, membership: Membership, sides: Sides) -> Membership:
    """Add LiRA to attacks that were made (`lira.py`).

    Shadow models are made as the return is: the emulator's outer layers are tuned, and measured in the base.
    """
    candidates, count = job.candidates, job.settings.shadows
    assert candidates is not None
    parts = job.rows.train.select(candidates.members), job.rows.held_out.select(candidates.others)
    pool = concatenate_datasets([part.select_columns(["input_ids", "labels"]) for part in parts])
    trained_NR = halves(count, len(pool), job.settings.seed)
    shadows = []
    for number, chosen_R in enumerate(trained_NR):
        job.tell("shadow models", number, count)
        shadows.append(_shadow(job, pool, np.flatnonzero(chosen_R).tolist(), number + 1))
    job.tell("shadow models", count, count)
    target_R = confidence(np.concatenate([side.plugged for side in sides]))
    scores_R = lira(target_R, confidence(np.stack(shadows)), trained_NR)
    split = len(candidates.members)
    online = measure_attack(scores_R[:split], scores_R[split:], job.bootstrap)
    return replace(membership, online=online, shadows=count)


def _shadow(job: Job, pool: Dataset, rows: list[int], number: int) -> Floats:
    """Losses of all candidates under one shadow model; `settings.steps` are scaled to its number of rows."""
    models, settings = job.models, job.settings
    steps = max(1, round(settings.steps * len(rows) / len(job.used)))
    how = replace(settings, steps=steps, seed=(settings.seed + number) % 2**32)
    with tuned(models.emulator, job.outer(models.emulator), Tuning(pool.select(rows), models.tokenizer, how)):
        layers = read_outer(models.emulator, models.split)
        with plugged(models.base, models.split, layers):
            return job.losses(models.base, pool)


_PARTS = (8, 4, 2)  # of the steps after which a run is measured on its way


def recovered(job: Job, full_ft: RowScores, emulator_zs: RowScores) -> tuple[RowScores, tuple[RecoveryPoint, ...]]:
    """Tune all decoder layers of the emulator, once for every learning rate.

    The way begins at `emulator_zs`, and ends at the base with its outer layers tuned, `full_ft`.

    Returns:
        Scores of the best run at its end, and every run's points, by learning rate and then by tokens.
    """
    ends: list[RowScores] = []
    points: list[RecoveryPoint] = []
    for lr in job.settings.rates:
        by_step, end = _run(job, lr)
        ends.append(end)
        points += [_point(lr, done, one, (full_ft, emulator_zs), job) for done, one in by_step.items()]
    return min(ends, key=lambda one: one.nll.sum()), tuple(points)


def _run(job: Job, lr: float) -> tuple[dict[int, RowScores], RowScores]:
    """One run: scores by steps done, and those at its end, with an accuracy if there is one."""
    emulator, settings = job.models.emulator, job.settings
    halts = {settings.steps // part for part in _PARTS} - {0, settings.steps}
    by_step: dict[int, RowScores] = {}
    tell = job.steps(RECOVERED)

    def measure_on_the_way(done: int, total: int) -> None:
        tell(done, total)
        if done in halts:
            by_step[done] = score_losses(emulator, job.rows.held_out, settings.eval_batch_size)

    everything = range(len(find_layers(emulator).layers))
    with tuned(emulator, everything, job.tuning, lr, measure_on_the_way):
        by_step[settings.steps] = job.measure(RECOVERED, emulator)
    return by_step, by_step[settings.steps]


def _point(lr: float, steps: int, scores: RowScores, ends: tuple[RowScores, RowScores], job: Job) -> RecoveryPoint:
    """A run at one time: its loss, and how much of the way it has come."""
    named = {"full": ends[0], "zero": ends[1], "here": scores}
    means = resample({name: -one.nll for name, one in named.items()}, scores.tokens, job.bootstrap)
    lengths = [len(job.rows.train[i]["input_ids"]) for i in job.used]
    tokens = round(steps * job.settings.batch_size * sum(lengths) / len(lengths))
    return RecoveryPoint(lr, tokens, negative(means.mean("here")), means.share("here", "zero", "full"))
