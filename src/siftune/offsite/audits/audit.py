"""Audit an offsite-tuning set-up: what the emulator gives the data owner, and what it gives away.

Five conditions on the same held-out rows, as in offsite-tuning (Xiao et al. 2023):

    Full ZS   the base model, nothing tuned             Emulator ZS   the emulator, nothing tuned
    Full FT   the base, its outer layers tuned          Emulator FT   the emulator, its outer layers tuned
    Plug-in   the base with the outer layers that were tuned on the emulator

and *(ours)*: *recovered*, the emulator with all its decoder layers tuned (embeddings, final norm and head are the
base's own in any kit, so that nothing of them is left to recover); the cosine of the outer layers' gradients; and
membership inference on the plugged model, with shadow models on request. All tunings start from the base's outer layers
and see the same rows in the same order.

A data owner has no base. `own_audit` makes the same attacks on a return with the loss under the emulator, before the
return is sent. If the emulator is near the base, so are the figures; the owner's own may be higher or lower, and so may
those of attacks that were not tried.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from siftune.base.environment import hardware, versions
from siftune.base.files import Progress
from siftune.base.text import jsonable
from siftune.data.read import load_rows
from siftune.offsite.audits.gradients import GradientCosine, gradient_cosine
from siftune.offsite.audits.members import (
    AuditRows,
    RowScores,
    accuracy_name,
    padding,
    score_losses,
    tokenize_audit,
)
from siftune.offsite.audits.membership import Membership
from siftune.offsite.audits.models import (
    OffsiteModels,
    check_models,
    on_accelerator,
    parameter_shares,
    plugged,
    read_outer,
    tuned,
)
from siftune.offsite.audits.result import (
    EMULATOR_FT,
    EMULATOR_ZS,
    FULL_FT,
    FULL_ZS,
    PLUG_IN,
    RECOVERED,
    Audit,
    RecoveryPoint,
    summarise,
)
from siftune.offsite.audits.settings import AuditOptions, AuditSettings
from siftune.offsite.audits.stages import Job, attack, choose_candidates, choose_rows, recovered
from siftune.offsite.exchange.calibration import in_batches
from siftune.offsite.exchange.load import load_kit
from siftune.offsite.exchange.plug import load_base
from siftune.offsite.exchange.returned import read_return
from siftune.offsite.exchange.updates import compare
from siftune.offsite.kit.folder import read_kit

Scores = dict[str, RowScores]  # by condition
_COMPARED = 64  # held-out rows on which gradients are compared, at most


def audit(
    models: OffsiteModels,
    rows: AuditRows,
    settings: AuditSettings | None = None,
    returned: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Audit a base model and an emulator of it, both in memory.

    They are tuned in place and put back bit for bit; nothing is loaded or saved. The same seed gives the same audit.

    Args:
        models: Base, emulator, their split and tokenizer.
        rows: Rows to tune on and held-out ones, from `tokenize_audit`. Where the steps do not suffice for all of the
            former, a draw of them is used, so that every row that is used is seen.
        settings: How to tune and measure.
        returned: The outer layers' tensors, by the names of `emulator.model.outer_names`, that a data owner sent back;
            they take the place of layers that are tuned here, and all training rows pass for theirs.
        progress: Called with what is being done, how much of it is done, and of how much.

    Raises:
        KitError: Base, emulator and return do not belong together.
        DataError: A row cannot be used, or none is left for membership inference.
        RecipeError: A setting is out of range.
        TrainingError: A tuning came upon a loss that is not finite.

    Example:
        >>> models = OffsiteModels(base, emulator, kit.manifest.split, tokenizer)
        >>> rows = tokenize_audit(train_rows, held_out_rows, tokenizer, settings)
        >>> result = audit(models, rows, settings)
        >>> result.comparisons["nll"].delta.low <= result.comparisons["nll"].delta.value
        True
    """
    settings = settings or AuditSettings()
    settings.check()
    check_models(models)
    outer = read_outer(models.base, models.split)
    if returned is not None:
        compare(outer, returned)
    used = choose_rows(rows, settings)
    trained = used if returned is None else range(len(rows.train))  # all rows may be the return's
    candidates = choose_candidates(rows, settings, trained) if settings.membership else None
    job = Job(models, rows, settings, used, candidates, progress)
    with plugged(models.emulator, models.split, outer):  # the base's own, where the kit's is rounded
        scores, cosine = _untuned(job)
        afterwards, membership = _tuned_outer(job, returned, scores[FULL_ZS])
        scores |= afterwards
        points: tuple[RecoveryPoint, ...] = ()
        if settings.recovery:
            scores[RECOVERED], points = recovered(job, scores[FULL_FT], scores[EMULATOR_ZS])
    shares = parameter_shares(models.base, models.emulator, models.split)
    return Audit(
        *summarise(scores, job.bootstrap), accuracy_name(rows), cosine, shares, membership, settings,
        _facts(job, returned is not None), points,
    )  # fmt: skip


def _untuned(job: Job) -> tuple[Scores, GradientCosine]:
    """Measure base and emulator, and compare gradients."""
    models = job.models
    scores = {FULL_ZS: job.measure(FULL_ZS, models.base), EMULATOR_ZS: job.measure(EMULATOR_ZS, models.emulator)}
    job.tell("gradients of the outer layers")
    some = job.rows.held_out.select(range(min(_COMPARED, len(job.rows.held_out))))
    batches = in_batches(some, job.settings.batch_size, padding(models.tokenizer))
    cosine = gradient_cosine(models.base, models.emulator, batches, models.split)
    job.tell("gradients of the outer layers", 1)
    return scores, cosine


def _tuned_outer(
    job: Job, returned: Mapping[str, Tensor] | None, zero_shot: RowScores
) -> tuple[Scores, Membership | None]:
    """Tune the outer layers of base and emulator, plug the emulator's into the base, and attack it.

    Tensors that were returned take the place of the emulator's; `zero_shot` are the base's scores before.
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


def audit_paths(options: AuditOptions, progress: Progress | None = None) -> Audit:
    """Audit a kit on disk.

    Raises:
        KitError: Kit or return is damaged, or does not belong to the base model.
        ModelError: The base model cannot be loaded.
        DataError, RecipeError, TrainingError: As `audit`.
    """
    options.check()
    kit = read_kit(options.kit)
    returned = None if options.returned is None else read_return(options.returned, kit)
    train = load_rows(options.train, "train", options.limit, options.columns)
    held_out = load_rows(options.eval, "test", options.eval_limit, options.columns)
    base, tokenizer = load_base(options.model, kit, options.dtype)
    emulator, _ = load_kit(kit, options.dtype)
    models = on_accelerator(OffsiteModels(base, emulator, kit.manifest.split, tokenizer))
    settings = options.settings()
    rows = tokenize_audit(train, held_out, tokenizer, settings)
    result = audit(models, rows, settings, returned, progress)
    names = {"model": options.model, "kit": kit.digest, "train": options.train, "eval": options.eval}
    return replace(result, facts={**names, **result.facts})


def _facts(job: Job, returned: bool) -> dict[str, Any]:
    """Facts besides the settings that the figures depend on."""
    return {
        "train_rows": len(job.rows.train),
        "tuned_rows": len(job.used),
        "held_out_rows": len(job.rows.held_out),
        "returned": returned,
        "dtype": str(job.models.base.dtype).removeprefix("torch."),
        "versions": versions(),
        "hardware": hardware(),
    }


@dataclass(frozen=True)
class OwnAudit:
    """The result of a data owner's audit."""

    membership: Membership  # the attacks, by losses under the emulator
    settings: AuditSettings
    facts: dict[str, Any]  # names and versions

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain types for JSON."""
        record: dict[str, Any] = jsonable(self)
        return record


def own_audit(
    models: OffsiteModels,
    rows: AuditRows,
    returned: Mapping[str, Tensor],
    settings: AuditSettings | None = None,
    progress: Progress | None = None,
) -> Membership:
    """Attack a return without the base.

    Args:
        models: The emulator, as base too; tuned in place and put back bit for bit.
        rows: Rows that the return was tuned on, and others of the same source.
        returned: Its tensors by neutral name.
        settings: How many rows, shadow models, and the seed.
        progress: Told what is being done.

    Raises:
        KitError: The return does not fit the emulator.
        DataError: Every other row is a training row too.
    """
    settings = settings or AuditSettings()
    settings.check()
    compare(read_outer(models.emulator, models.split), returned)
    candidates = choose_candidates(rows, settings, range(len(rows.train)))  # all rows may be the return's
    job = Job(models, rows, settings, choose_rows(rows, settings), candidates, progress)
    plug = partial(plugged, models.emulator, models.split, returned)
    before = score_losses(models.emulator, rows.held_out, settings.eval_batch_size)
    with plug():
        after = score_losses(models.emulator, rows.held_out, settings.eval_batch_size)
    membership = attack(job, plug, before, after)
    assert membership is not None  # there are candidates
    return membership


def own_audit_paths(options: AuditOptions, progress: Progress | None = None) -> OwnAudit:
    """Attack a return on disk without the base; no model need be named.

    Raises:
        InputError: On a kit, return, rows or settings that cannot be used.
    """
    options.check()
    kit = read_kit(options.kit)
    assert options.returned is not None  # checked where no model is named
    returned = read_return(options.returned, kit)
    train = load_rows(options.train, "train", options.limit, options.columns)
    others = load_rows(options.eval, "test", options.eval_limit, options.columns)
    emulator, tokenizer = load_kit(kit, options.dtype)
    settings = options.settings()
    rows = tokenize_audit(train, others, tokenizer, settings)
    models = on_accelerator(OffsiteModels(emulator, emulator, kit.manifest.split, tokenizer))
    membership = own_audit(models, rows, returned, settings, progress)
    facts = {"kit": kit.digest, "train": options.train, "eval": options.eval, "versions": versions()}
    return OwnAudit(membership, settings, facts)
