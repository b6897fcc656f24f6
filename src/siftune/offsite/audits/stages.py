"""The stages of an audit: each puts models into a state, measures them, and puts them back."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from siftune.errors import DataError
from siftune.evaluate.bootstrap import Bootstrap
from siftune.files import Progress
from siftune.models.layers import find_layers
from siftune.offsite.audits.gradients import GradientCosine, gradient_cosine
from siftune.offsite.audits.membership import Membership, RowLosses, infer_membership
from siftune.offsite.audits.models import OffsiteModels, plugged, random_floor, read_outer, unshared
from siftune.offsite.audits.result import EMULATOR_FT, EMULATOR_ZS, FLOOR, FULL_FT, FULL_ZS, LABELS, PLUG_IN, RECOVERED
from siftune.offsite.audits.rows import AuditRows, RowScores, drawn, not_among, score_losses, score_rows
from siftune.offsite.audits.settings import AuditSettings
from siftune.offsite.audits.tuning import Steps, Tuning, tuned
from siftune.offsite.protocol.calibration import in_batches

logger = logging.getLogger(__name__)

Scores = dict[str, RowScores]  # by condition


@dataclass(frozen=True)
class Candidates:
    """Rows for membership inference.

    Attributes:
        members: Indices of training rows that the outer layers were tuned on.
        others: Indices of held-out rows that are no training rows.
        left_out: Held-out rows that are.
    """

    members: list[int]
    others: list[int]
    left_out: int


@dataclass(frozen=True)
class Job:
    """All that the stages need.

    Attributes:
        models: Base and emulator.
        rows: Rows in token ids.
        settings: How to tune and measure.
        used: Indices of the training rows that are tuned on.
        candidates: Rows for membership inference; None to leave it out.
        progress: Told what is being done.
    """

    models: OffsiteModels
    rows: AuditRows
    settings: AuditSettings
    used: list[int]
    candidates: Candidates | None
    progress: Progress | None = None

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
    """Draw rows for membership inference.

    Args:
        rows: The rows.
        settings: How many, and the seed.
        trained: Indices of the training rows that the outer layers were tuned on.

    Raises:
        DataError: No held-out row is left.
    """
    others = not_among(rows.held_out, rows.train)
    if not others:
        raise DataError(
            "every held-out row is a training row too, so membership cannot be inferred; give held-out rows of their "
            "own, or leave membership out."
        )
    members, outsiders = (drawn(indices, settings.membership_rows, settings.seed) for indices in (trained, others))
    return Candidates(members, outsiders, left_out=len(rows.held_out) - len(others))


def bootstrap(settings: AuditSettings) -> Bootstrap:
    """How intervals are drawn."""
    return Bootstrap(settings.resamples, settings.level, settings.seed)


def untuned(job: Job) -> tuple[Scores, GradientCosine]:
    """Measure base, emulator and random weights, and compare gradients."""
    models = job.models
    scores = {FULL_ZS: _measure(job, FULL_ZS, models.base), EMULATOR_ZS: _measure(job, EMULATOR_ZS, models.emulator)}
    floor = random_floor(models.base, job.settings.seed)
    scores[FLOOR] = _measure(job, FLOOR, floor)
    del floor  # before gradients need its memory
    job.tell("gradients of the outer layers")
    some = job.rows.held_out.select(range(min(job.settings.gradient_rows, len(job.rows.held_out))))
    chosen = in_batches(some, job.settings.batch_size, _padding(models))
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
    with tuned(models.base, _outer(job, models.base), _tuning(job), steps=_steps(job, FULL_FT)):
        scores[FULL_FT] = _measure(job, FULL_FT, models.base)
    if returned is None:
        with tuned(models.emulator, _outer(job, models.emulator), _tuning(job), steps=_steps(job, EMULATOR_FT)):
            returned = read_outer(models.emulator, models.split)
    with plugged(models.emulator, models.split, returned):
        scores[EMULATOR_FT] = _measure(job, EMULATOR_FT, models.emulator)
    plug = partial(plugged, models.base, models.split, returned)
    with plug():
        scores[PLUG_IN] = _measure(job, PLUG_IN, models.base)
    return scores, _attack(job, plug, zero_shot, scores[PLUG_IN])


def recovered(job: Job) -> RowScores:
    """Tune all decoder layers of the emulator, and measure it."""
    emulator, lr = job.models.emulator, job.settings.recovery_lr
    everything = range(len(find_layers(emulator).layers))
    with unshared(emulator), tuned(emulator, everything, _tuning(job), lr, _steps(job, RECOVERED)):
        return _measure(job, RECOVERED, emulator)


def _attack(
    job: Job, plug: Callable[[], AbstractContextManager[None]], zero_shot: RowScores, plug_in: RowScores
) -> Membership | None:
    """Infer membership from losses; those of held-out rows are known already."""
    candidates, base = job.candidates, job.models.base
    if candidates is None:
        return None
    job.tell("membership inference")
    members = job.rows.train.select(candidates.members)
    before = score_losses(base, members, job.settings.eval_batch_size)
    with plug():
        after = score_losses(base, members, job.settings.eval_batch_size)
    job.tell("membership inference", 1)
    others = [scores.per_token[candidates.others] for scores in (zero_shot, plug_in)]
    return infer_membership(
        RowLosses(before.per_token, after.per_token), RowLosses(*others), candidates.left_out, bootstrap(job.settings)
    )


def _measure(job: Job, condition: str, model: nn.Module) -> RowScores:
    job.tell(f"{LABELS[condition]}: measuring")
    scores = score_rows(model, job.rows, job.settings.eval_batch_size)
    job.tell(f"{LABELS[condition]}: measuring", 1)
    return scores


def _tuning(job: Job) -> Tuning:
    return Tuning(job.rows.train.select(job.used), job.models.tokenizer, job.settings)


def _steps(job: Job, condition: str) -> Steps:
    return partial(job.tell, f"{LABELS[condition]}: tuning")


def _outer(job: Job, model: nn.Module) -> list[int]:
    return job.models.split.outer(len(find_layers(model).layers))


def _padding(models: OffsiteModels) -> int:
    number: int | None = models.tokenizer.pad_token_id
    return 0 if number is None else number
