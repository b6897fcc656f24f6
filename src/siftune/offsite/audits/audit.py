"""Audit an offsite-tuning set-up: what the emulator gives the data owner, and what it gives away.

Five conditions on the same held-out rows, as in offsite-tuning (Xiao et al. 2023):

    Full ZS   the base model, nothing tuned             Emulator ZS   the emulator, nothing tuned
    Full FT   the base, its outer layers tuned          Emulator FT   the emulator, its outer layers tuned
    Plug-in   the base with the outer layers that were tuned on the emulator

and besides (ours): *recovered*, the emulator with all its decoder layers tuned (embeddings, final norm and head are
the base's own in any kit, so nothing in them is left to recover); a floor of random weights; the cosine of the outer
layers' gradients; membership inference on the plugged model, with shadow models if asked for; canaries, if asked for;
and the attack on the kit's calibration rows where these are given. All tunings start from the base's outer layers and
see the same rows in the same order.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from siftune.data.readers import load_rows
from siftune.environment import hardware, versions
from siftune.errors import KitError
from siftune.files import Progress
from siftune.models.source import load_model
from siftune.offsite.audits.attacks import calibration_leak
from siftune.offsite.audits.job import Job, choose_candidates, choose_rows
from siftune.offsite.audits.models import (
    OffsiteModels,
    check_models,
    kept_fraction,
    on_accelerator,
    plugged,
    read_outer,
)
from siftune.offsite.audits.planting import plant
from siftune.offsite.audits.recovery import recovered
from siftune.offsite.audits.result import EMULATOR_ZS, FULL_FT, FULL_ZS, RECOVERED, Audit, RecoveryPoint, summarise
from siftune.offsite.audits.rows import AuditRows, accuracy_name, tokenize_audit, with_calibration
from siftune.offsite.audits.settings import AuditOptions, AuditSettings
from siftune.offsite.audits.stages import Scores, tuned_outer, untuned
from siftune.offsite.kit.fingerprint import fingerprint
from siftune.offsite.kit.folder import Kit, read_kit
from siftune.offsite.protocol.load import load_kit
from siftune.offsite.protocol.returned import read_return
from siftune.offsite.protocol.updates import compare


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
        scores, cosine = untuned(job)
        tuned, membership = tuned_outer(job, returned, scores[FULL_ZS])
        scores |= tuned
        points = _recover(job, scores) if settings.recovery else ()
        canaries = plant(job) if settings.canaries else None
    return Audit(
        *summarise(scores, job.bootstrap), accuracy_name(rows), cosine, kept_fraction(models), membership, settings,
        _facts(job, returned is not None), points, canaries, calibration_leak(job),
    )  # fmt: skip


def _job(
    models: OffsiteModels, rows: AuditRows, settings: AuditSettings, returned: bool, progress: Progress | None
) -> Job:
    """What is tuned on and who is asked about: of a return that came back, all training rows."""
    used = choose_rows(rows, settings)
    trained = range(len(rows.train)) if returned else used
    candidates = choose_candidates(rows, settings, trained) if settings.membership else None
    return Job(models, rows, settings, used, candidates, progress)


def _recover(job: Job, scores: Scores) -> tuple[RecoveryPoint, ...]:
    """Tune the whole emulator: its best scores go to the others."""
    found = recovered(job, scores[FULL_FT], scores[EMULATOR_ZS])
    scores[RECOVERED] = found.best
    return found.points


def audit_paths(options: AuditOptions, progress: Progress | None = None) -> Audit:
    """Audit a kit on disk.

    Args:
        options: Paths and settings.
        progress: As for `audit`.

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
    models = on_accelerator(OffsiteModels(base, emulator, kit.manifest.split, tokenizer, _reference(options, kit)))
    settings = options.settings()
    rows = with_calibration(tokenize_audit(train, held_out, tokenizer, settings), tokenizer, options)
    result = audit(models, rows, settings, returned, progress)
    names = {"model": options.model, "kit": kit.digest, "train": options.train, "eval": options.eval}
    return replace(result, facts={**names, **result.facts})


def _reference(options: AuditOptions, kit: Kit) -> PreTrainedModel | None:
    """The emulator of the kit that other rows calibrated."""
    if not options.reference:
        return None
    other = read_kit(options.reference)
    if (other.manifest.fingerprint, other.manifest.split) != (kit.manifest.fingerprint, kit.manifest.split):
        raise KitError(f"{options.reference}: it is of another base or split than {options.kit}: make it with the same")
    return load_kit(other, options.dtype)[0]


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
