"""The conditions of an audit: each stage puts models into a state, measures them, and puts them back."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from siftune.offsite.audits.attacks import attack
from siftune.offsite.audits.gradients import GradientCosine, gradient_cosine
from siftune.offsite.audits.job import Job
from siftune.offsite.audits.membership import Membership
from siftune.offsite.audits.models import plugged, random_floor, read_outer
from siftune.offsite.audits.result import EMULATOR_FT, EMULATOR_ZS, FLOOR, FULL_FT, FULL_ZS, PLUG_IN
from siftune.offsite.audits.rows import RowScores, padding
from siftune.offsite.audits.tuning import tuned
from siftune.offsite.protocol.calibration import in_batches

Scores = dict[str, RowScores]  # by condition


def untuned(job: Job) -> tuple[Scores, GradientCosine]:
    """Measure base, emulator and random weights, and compare gradients."""
    models = job.models
    scores = {FULL_ZS: job.measure(FULL_ZS, models.base), EMULATOR_ZS: job.measure(EMULATOR_ZS, models.emulator)}
    floor = random_floor(models.base, job.settings.seed)
    scores[FLOOR] = job.measure(FLOOR, floor)
    del floor  # before gradients need its memory
    job.tell("gradients of the outer layers")
    some = job.rows.held_out.select(range(min(job.settings.gradient_rows, len(job.rows.held_out))))
    chosen = in_batches(some, job.settings.batch_size, padding(models.tokenizer))
    cosine = gradient_cosine(models.base, models.emulator, chosen, models.split)
    job.tell("gradients of the outer layers", 1)
    return scores, cosine


def tuned_outer(
    job: Job, returned: Mapping[str, Tensor] | None, zero_shot: RowScores
) -> tuple[Scores, Membership | None]:
    """Tune the outer layers of base and emulator, plug the emulator's into the base, and attack it.

    Args:
        job: The job.
        returned: Tuned tensors in place of the emulator's.
        zero_shot: The base's scores before tuning.
    """
    models = job.models
    scores: Scores = {}
    with tuned(models.base, job.outer(models.base), job.tuning, steps=job.steps(FULL_FT)):
        scores[FULL_FT] = job.measure(FULL_FT, models.base)
    if returned is None:
        with tuned(models.emulator, job.outer(models.emulator), job.tuning, steps=job.steps(EMULATOR_FT)):
            returned = read_outer(models.emulator, models.split)
    with plugged(models.emulator, models.split, returned):
        scores[EMULATOR_FT] = job.measure(EMULATOR_FT, models.emulator)
    plug = partial(plugged, models.base, models.split, returned)
    with plug():
        scores[PLUG_IN] = job.measure(PLUG_IN, models.base)
    return scores, attack(job, plug, zero_shot, scores[PLUG_IN])
