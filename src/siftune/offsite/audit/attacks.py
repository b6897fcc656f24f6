"""The attacks: which rows was a return tuned on, and which was a kit calibrated on?"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
from datasets import Dataset, concatenate_datasets

from siftune.evaluate.bootstrap import Floats
from siftune.offsite.audit.calibration_attack import CalibrationLeak, attack_calibration
from siftune.offsite.audit.job import Job
from siftune.offsite.audit.lira import confidence, halves, lira
from siftune.offsite.audit.membership import Membership, RowLosses, infer_membership, measure_attack
from siftune.offsite.audit.models import plugged, read_outer
from siftune.offsite.audit.rows import RowScores, padding
from siftune.offsite.audit.tuning import Tuning, tuned
from siftune.offsite.exchange.calibration import in_batches

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
    found = infer_membership(*sides, candidates.left_out, job.bootstrap)
    return with_shadows(job, found, sides) if job.settings.shadows else found


def with_shadows(job: Job, found: Membership, sides: Sides) -> Membership:
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
    scores = lira(target_R, confidence(np.stack(shadows)), trained_NR)
    split = len(candidates.members)
    online, offline = (measure_attack(one[:split], one[split:], job.bootstrap) for one in scores)
    return replace(found, online=online, offline=offline, shadows=count)


def _shadow(job: Job, pool: Dataset, rows: list[int], number: int) -> Floats:
    """Losses of all candidates under one shadow model, which passes over its rows as often as the return's tuning."""
    models, settings = job.models, job.settings
    steps = max(1, round(settings.steps * len(rows) / len(job.used)))
    how = replace(settings, steps=steps, seed=(settings.seed + number) % 2**32)
    with tuned(models.emulator, job.outer(models.emulator), Tuning(pool.select(rows), models.tokenizer, how)):
        layers = read_outer(models.emulator, models.split)
        with plugged(models.base, models.split, layers):
            return job.losses(models.base, pool)


def calibration_leak(job: Job) -> CalibrationLeak | None:
    """Tell calibration rows from others of their source, by base and kit; None where there are no such rows."""
    rows, models = job.rows, job.models
    if rows.calibrated is None or rows.uncalibrated is None:
        return None
    job.tell("calibration rows")
    sides = rows.calibrated, rows.uncalibrated
    own, others = (in_batches(side, job.settings.eval_batch_size, padding(models.tokenizer)) for side in sides)
    found = attack_calibration(models.base, models.emulator, models.split, own, others, job.bootstrap)
    known, unknown = (-job.losses(models.base, side) for side in sides)
    blind = measure_attack(known, unknown, job.bootstrap)
    job.tell("calibration rows", 1)
    return replace(found, blind=blind)
