"""Audit an offsite-tuning set-up: what the emulator gives the data owner, and what it gives away.

Five conditions on the same held-out rows, as in offsite-tuning (Xiao et al. 2023):

    Full ZS   the base model, nothing tuned             Emulator ZS   the emulator, nothing tuned
    Full FT   the base, its outer layers tuned          Emulator FT   the emulator, its outer layers tuned
    Plug-in   the base with the outer layers that were tuned on the emulator

and besides (ours): *recovered*, the emulator with all its decoder layers tuned (embeddings, final norm and head are
the base's own in any kit, so nothing in them is left to recover); a floor of random weights; the cosine of the outer
layers' gradients; membership inference on the plugged model, with shadow models if asked for;
and the attack on the kit's calibration rows where these are given. All tunings start from the base's outer layers and
see the same rows in the same order.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from siftune.base.environment import hardware, versions
from siftune.base.errors import KitError
from siftune.base.files import Progress
from siftune.data.read import load_rows
from siftune.models.load import load_model
from siftune.offsite.audit.attacks import attack, calibration_leak
from siftune.offsite.audit.gradients import GradientCosine, gradient_cosine
from siftune.offsite.audit.job import Job, choose_candidates, choose_rows
from siftune.offsite.audit.membership import Membership
from siftune.offsite.audit.models import (
    OffsiteModels,
    check_models,
    kept_fraction,
    on_accelerator,
    plugged,
    random_floor,
    read_outer,
)
from siftune.offsite.audit.recovery import recovered
from siftune.offsite.audit.result import (
    EMULATOR_FT,
    EMULATOR_ZS,
    FLOOR,
    FULL_FT,
    FULL_ZS,
    PLUG_IN,
    RECOVERED,
    Audit,
    RecoveryPoint,
    summarise,
)
from siftune.offsite.audit.rows import AuditRows, RowScores, accuracy_name, padding, tokenize_audit, with_calibration
from siftune.offsite.audit.settings import AuditOptions, AuditSettings
from siftune.offsite.audit.tuning import tuned
from siftune.offsite.exchange.calibration import in_batches
from siftune.offsite.exchange.load import load_kit
from siftune.offsite.exchange.returned import read_return
from siftune.offsite.exchange.updates import compare
from siftune.offsite.kit.fingerprint import fingerprint
from siftune.offsite.kit.folder import read_kit

Scores = dict[str, RowScores]  # by condition


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
        returned: The outer layers' tensors, by the names of `emulator.split`, that a data owner sent back; they take
            the place of layers that are tuned here, and all training rows pass for theirs.
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
    job = _job(models, rows, settings, returned is not None, progress)
    with plugged(models.emulator, models.split, outer):  # the base's own, where the kit's is rounded
        scores, cosine = _untuned(job)
        afterwards, membership = _tuned_outer(job, returned, scores[FULL_ZS])
        scores |= afterwards
        points: tuple[RecoveryPoint, ...] = ()
        if settings.recovery:
            scores[RECOVERED], points = recovered(job, scores[FULL_FT], scores[EMULATOR_ZS])
    kept = kept_fraction(models.base, models.emulator, models.split)
    return Audit(
        *summarise(scores, job.bootstrap), accuracy_name(rows), cosine, kept, membership, settings,
        _facts(job, returned is not None), points, calibration_leak(job),
    )  # fmt: skip


def _job(
    models: OffsiteModels, rows: AuditRows, settings: AuditSettings, returned: bool, progress: Progress | None
) -> Job:
    """What is tuned on and who is asked about: of a return that came back, all training rows."""
    used = choose_rows(rows, settings)
    trained = range(len(rows.train)) if returned else used
    candidates = choose_candidates(rows, settings, trained) if settings.membership else None
    return Job(models, rows, settings, used, candidates, progress)


def _untuned(job: Job) -> tuple[Scores, GradientCosine]:
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
    kit = read_kit(options.kit, options.public_key)
    returned = None if options.returned is None else read_return(options.returned, kit)
    train = load_rows(options.train, options.train_split, options.limit, options.format)
    held_out = load_rows(options.eval, options.eval_split, options.eval_limit, options.format)
    base, tokenizer = load_model(options.model, options.dtype)
    if fingerprint(base) != kit.manifest.fingerprint:
        raise KitError(
            f"{options.kit}/manifest.json: base.fingerprint is not that of the model {options.model}; give the model "
            "that the kit was made of, with the --dtype that it was made with"
        )
    emulator, _ = load_kit(kit, options.dtype)
    models = on_accelerator(OffsiteModels(base, emulator, kit.manifest.split, tokenizer))
    settings = options.settings()
    rows = with_calibration(tokenize_audit(train, held_out, tokenizer, settings), tokenizer, options)
    result = audit(models, rows, settings, returned, progress)
    names = {"model": options.model, "kit": kit.digest, "train": options.train, "eval": options.eval}
    return replace(result, facts={**names, **result.facts})


def _facts(job: Job, returned: bool) -> dict[str, Any]:
    """What the figures depend on besides the settings."""
    return {
        "train_rows": len(job.rows.train),
        "tuned_rows": len(job.used),
        "held_out_rows": len(job.rows.held_out),
        "returned": returned,
        "dtype": str(job.models.base.dtype).removeprefix("torch."),
        "versions": versions(),
        "hardware": hardware(),
    }
